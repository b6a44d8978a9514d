"""``dynrank ranks``: the table says what the run would do; commands have help and a version without importing torch."""

import subprocess
import sys

import pytest
from rich.console import Console

import dynrank
from dynrank import train
from dynrank.commands import cli
from dynrank.commands.exits import usage_errors
from dynrank.commands.ranks import print_ranks
from dynrank.output import console


@pytest.mark.parametrize("error", [OSError(28, "No space left"), Exception("No space left (os error 28)")])
def test_a_full_disk_is_a_failure_in_one_line(error, capsys):
    with pytest.raises(SystemExit) as caught, usage_errors():
        raise error
    assert (caught.value.code, capsys.readouterr().err.count("\n")) == (1, 1)
    # An error that nobody expects keeps its traceback.
    with pytest.raises(OSError, match="No such"), usage_errors():
        raise OSError(2, "No such file")


@pytest.fixture
def table(monkeypatch, capsys):
    """Prints the table for some overrides on a wide terminal; returns its rows as lists of cells."""
    monkeypatch.setattr(console, "table_console", lambda: Console(width=250))

    def rows(*overrides):
        print_ranks(dynrank.compose(overrides))
        lines = capsys.readouterr().out.splitlines()
        return [[cell.strip() for cell in line.strip("│┃").split("│")] for line in lines if line.startswith("│")]

    return rows


def test_ranks_lists_every_layer_with_its_totals(table):
    *layers, total = table("schedule=after_convergence", "schedule.shared=false")
    assert len(layers) == 37
    assert total[0] == "37 layers"
    # by hand: 6 encoder layers of d = 384, mlp 1536, and the pooler, at r = 32 and 16
    width = 6 * (4 * (384 + 384) + 2 * (384 + 1536)) + 384 + 384
    assert total[6:8] == [f"{32 * width:,}", f"{16 * width:,}"]
    assert {(row[2], row[3], row[8]) for row in layers} == {("32", "16", "lora.rank")}


def test_ranks_shows_rules_pins_and_scaling(table, tmp_path):
    file = tmp_path / "ranks.yaml"
    file.write_text("rank_pattern:\n  query: {rank: 8, alpha: 32, pinned: true}\n  value: {rank: 64, final_rank: 4}\n")
    *layers, _ = table(
        f"rank_map.file={file}", "lora.target_modules=attention", "schedule=after_convergence", "schedule.shared=false"
    )
    by_kind = {row[0].rpartition(".")[2]: row for row in layers}
    assert by_kind["query"][2:6] == ["8", "8 (pinned)", "32", "4"]
    assert by_kind["value"][2:6] == ["64", "4", "64", "1"]
    assert by_kind["key"][2:6] == ["32", "16", "64", "2"]
    assert [by_kind[kind][8] for kind in ("query", "value", "key")] == ["query", "value", "lora.rank"]


def test_ranks_shows_a_range_where_the_data_decide_and_the_budget_where_there_is_one(table):
    *layers, total = table("schedule=early_budget", "schedule.lowest=2", "schedule.share=0.5")
    assert {(row[2], row[3]) for row in layers} == {("32", "2-32")}
    # The sum of d_in + d_out over all layers is 42,240.
    assert total[7] == f"{2 * 42_240:,}-{16 * 42_240:,}"


def test_ranks_names_the_layers_that_a_rank_map_exempts_from_the_cap(monkeypatch):
    """A server's slot has the highest rank in every layer, so one exception is worth its line."""
    said = []
    monkeypatch.setattr("dynrank.commands.ranks.print_table", said.append)
    budget = ["schedule=early_budget", "schedule.final_rank=4", "schedule.highest=8"]
    print_ranks(dynrank.compose([*budget, "+rank_map.rank_pattern={pooler.dense: {highest: 13}}"]))
    print_ranks(dynrank.compose(budget))
    name = "bert.pooler.dense"
    assert said[0].caption == (
        "at the end at most: highest rank 13, average 8.1: a server's slot has 16 in every layer, because of 1 of 37 "
        f"layers: {name} (13)"
    )
    assert said[1].caption.endswith("a server's slot has 8 in every layer")


def test_final_ranks_of_a_run_are_a_rank_map(table, smoke_run):
    folder, _ = smoke_run
    *layers, _ = table(f"rank_map.file={folder / 'final_ranks.yaml'}", "schedule=fixed")
    assert {(row[2], row[3], row[4], row[5]) for row in layers} == {("16", "16", "32", "2")}
    assert all(row[8] == row[0] for row in layers)


COMMANDS = [[], *([name] for name in ("ranks", "plan", "squeeze", "merge", "predict", "inspect", "report", "sweep"))]
NO_TORCH = """
import sys
import dynrank
assert "hydra" not in sys.modules
from dynrank import train
from dynrank.commands import cli

for main, *arguments in [(train.main, "--help"), *((cli.main, *words, "--help") for words in {commands})]:
    sys.argv = [main.__module__, *arguments]
    try:
        main()
    except SystemExit as end:
        assert not end.code, arguments
    assert not set(sys.modules) & {{"torch", "lightning", "transformers", "matplotlib"}}, arguments
"""


def test_import_and_help_of_every_command_load_no_torch(tmp_path):
    code = NO_TORCH.format(commands=COMMANDS)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for text in ("squeeze", "--energy", "--plot", "schedule"):
        assert text in done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("main", [cli.main, train.main], ids=["dynrank", "dynrank-train"])
def test_version(main, launch):
    assert launch(main, "--version") == (0, f"dynrank {dynrank.__version__}\n", "")


def test_ctrl_c_exits_with_130_and_advises_nothing(launch, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "app", interrupted)
    assert launch(cli.main) == (130, "", "interrupted\n")
