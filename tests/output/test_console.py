"""Tables as they are printed."""

from dynrank.output.console import empty_table, print_table


def test_a_very_long_table_has_the_cells_that_a_short_one_has(capsys):
    def printed(rows):
        table = empty_table("numbers", "layer", "value", "of it")
        for index in range(rows):
            table.add_row(f"layer {index}", f"{index:,}", "")
        table.add_section()
        table.add_row("all", "", f"{rows:,}")
        print_table(table)
        return [line.replace("│", " ").replace("┃", " ").split() for line in capsys.readouterr().out.splitlines()]

    short, long = printed(12), printed(1200)
    assert long[:1] == [["numbers"]] == short[:1]
    assert [line for line in short if line[:1] in (["layer"], ["all"])] == [*long[1:14], ["all", "12"]]
    assert [len(long), long[-2:]] == [1203, [["layer", "1199", "1,199"], ["all", "1,200"]]]
