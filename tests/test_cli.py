"""``dynrank ranks``: the table says what the run would do; all commands have help."""

import re
import sys

import pytest
from rich.console import Console

import dynrank
from dynrank import cli, rank_table


@pytest.fixture
def table(monkeypatch, capsys):
    """Prints the table for some overrides on a wide terminal; returns its rows as lists of cells."""
    monkeypatch.setattr(rank_table, "table_console", lambda: Console(width=250))

    def rows(*overrides):
        rank_table.print_ranks(dynrank.compose(overrides))
        lines = capsys.readouterr().out.splitlines()
        return [[cell.strip() for cell in line.strip("│┃").split("│")] for line in lines if line.startswith("│")]

    return rows


def test_ranks_lists_every_layer_with_its_totals(table):
    *layers, total = table()
    assert len(layers) == 37
    assert total[0] == "37 layers"
    # by hand: 6 encoder layers of d = 384, mlp 1536, and the pooler, at r = 32 and 16
    width = 6 * (4 * (384 + 384) + 2 * (384 + 1536)) + 384 + 384
    assert total[6:8] == [f"{32 * width:,}", f"{16 * width:,}"]
    assert {row[8] for row in layers} == {"lora.rank"}


def test_ranks_shows_rules_pins_and_scaling(table, tmp_path):
    file = tmp_path / "ranks.yaml"
    file.write_text("rank_pattern:\n  query: {rank: 8, alpha: 32, pinned: true}\n  value: {rank: 64, final_rank: 4}\n")
    *layers, _ = table(f"rank_map.file={file}", "lora.target_modules=attention")
    by_kind = {row[0].rpartition(".")[2]: row for row in layers}
    assert by_kind["query"][2:6] == ["8", "8 (pinned)", "32", "4"]
    assert by_kind["value"][2:6] == ["64", "4", "64", "1"]
    assert by_kind["key"][2:6] == ["32", "16", "64", "2"]
    assert [by_kind[kind][8] for kind in ("query", "value", "key")] == ["query", "value", "lora.rank"]


def test_ranks_trains_nothing_and_writes_nothing(run_command, tmp_path):
    done = run_command("dynrank", "ranks", "schedule=fixed", "lora.rank=4", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "37 layers" in done.stdout
    assert not list(tmp_path.iterdir())


def test_default_run_shows_16_as_final_rank(table):
    assert {(row[2], row[3]) for row in table()[:-1]} == {("32", "16")}


@pytest.mark.parametrize("command", ["ranks", "squeeze", "inspect"])
def test_help_of_a_command_exits_with_0(command, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["dynrank", command, "--help"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 0
    assert command in capsys.readouterr().out


@pytest.mark.parametrize("name", ["dynrank", "dynrank-train"])
def test_help_exits_with_0(run_command, tmp_path, name):
    done = run_command(name, "--help", cwd=tmp_path)
    assert done.returncode == 0
    assert re.search(r"ranks|config", done.stdout)
