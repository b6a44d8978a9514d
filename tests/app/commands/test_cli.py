"""``dynrank ranks``: the table says what the run would do; commands have help and a version without importing torch."""

import errno
import re
import subprocess
import sys

import pytest
from rich.console import Console
from transformers import AutoTokenizer

import dynrank
from dynrank.app import train
from dynrank.app.commands import cli
from dynrank.app.commands.cli import print_ranks
from dynrank.app.runs.overrides import usage_errors
from dynrank.output import console


def test_an_error_that_nobody_expects_keeps_its_traceback():
    with pytest.raises(OSError, match="I/O error"), usage_errors():
        raise OSError(errno.EIO, "I/O error")


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
    rules = "  query: {rank: 8, alpha: 32, pinned: true}\n  value: {rank: 64, final_rank: 4}\n  key: {lowest: 20}\n"
    file.write_text(f"rank_pattern:\n{rules}  attention: {{lowest: 4, highest: 12}}\n")
    *layers, _ = table(
        f"rank_map.file={file}", "lora.target_modules=attention", "schedule=after_convergence", "schedule.shared=false"
    )
    by_kind = {row[0].rpartition(".")[2]: row for row in layers}
    assert by_kind["query"][2:6] == ["8", "8 (pinned)", "32", "4"]
    assert by_kind["value"][2:6] == ["64", "4", "64", "1"]
    assert by_kind["key"][2:6] == ["32", "20 (at least 20)", "64", "2"]
    assert by_kind["dense"][2:6] == ["32", "12 (4 to 12)", "64", "2"]
    assert [by_kind[kind][8] for kind in ("query", "value", "key", "dense")] == ["query", "value", "key", "attention"]


def test_ranks_shows_what_to_expect_where_the_data_decide(table):
    *layers, total = table("schedule=early_budget", "schedule.lowest=2", "schedule.share=0.5")
    assert {row[2] for row in layers} == {"32"}
    assert all(row[3].startswith("about ") for row in layers)
    # The sum of d_in + d_out over all layers is 42,240, and a step of the widest layer costs 1,920.
    assert 16 * 42_240 - 1_920 < int(total[7].replace(",", "")) <= 16 * 42_240


@pytest.mark.parametrize(
    ("schedule", "said"),
    [
        (
            ["early_budget", "schedule.final_rank=8"],
            "rank 8.* on average; a server .* up to 32; schedule.highest=16 limits it",
        ),
        (
            ["after_convergence", "schedule.shared=false"],
            "at the end, highest rank 16, average 16.0: a server's slot has 16",
        ),
    ],
)
def test_ranks_says_how_high_a_servers_slot_can_become(schedule, said, monkeypatch, capsys):
    monkeypatch.setattr(console, "table_console", lambda: Console(width=250))
    print_ranks(dynrank.compose([f"schedule={schedule[0]}", *schedule[1:]]))
    assert re.search(said, capsys.readouterr().out)


def test_ranks_counts_the_parameters_of_all_experts(table, tiny_moe, tiny_llama, tmp_path):
    tiny_moe("Qwen3Moe", vocab_size=600).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path)
    cells = {row[0]: row for row in table("task=text", f"task.model={tmp_path}", "lora.rank=4", "schedule=fixed")}
    for name, layer in dynrank.lora_layers(dynrank.add_lora(tiny_moe("Qwen3Moe", vocab_size=600), rank=4)):
        assert cells[name][2:4] == ["4", "4"]
        assert cells[name][6] == f"{layer.lora_A.numel() + layer.lora_B.numel():,}"
    assert cells["model.layers.0.mlp.experts.gate_up_proj"][1] == "4 x 24 x 16"


COMMANDS = [[], *([name] for name in ("ranks", "plan", "squeeze", "merge", "predict", "inspect", "report", "sweep"))]
NO_TORCH = """
import sys
import dynrank
assert "hydra" not in sys.modules
from dynrank.app import train
from dynrank.app.commands import cli

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


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["ranks", "RUN"], "'RUN' is a folder; .*: dynrank inspect RUN"),
        (["train", "lora.rank=8"], "dynrank-train"),
        (["sweep", "lora.rank=4,8"], r"FOLDER of a sweep .*'lora\.rank=4,8'.*dynrank-train --multirun"),
    ],
)
def test_a_command_for_something_else_names_the_right_one(arguments, said, launch, tmp_path):
    (tmp_path / "RUN").mkdir()
    code, _, message = launch(cli.main, *arguments)
    assert code == 2
    assert re.search(said, message)


def test_help_ends_quietly_when_its_reader_has_gone():
    """As in ``dynrank-train --help | head -1``."""
    command = f"'{sys.executable}' -m dynrank.train --help | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert (done.stdout.count("\n"), done.stderr) == (1, "")
