"""``dynrank ranks``: the table says what the run would do; commands have help and a version without importing torch."""

import errno
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
    """Prints the table for some overrides on a wide terminal; returns its rows of cells, and the text below."""
    monkeypatch.setattr(console, "table_console", lambda: Console(width=300))

    def shown(*overrides):
        print_ranks(dynrank.compose(overrides))
        out = capsys.readouterr().out
        rows = [line.split("│")[1:-1] for line in out.splitlines() if line.startswith("│")]
        cells = [[cell.strip() for cell in row] for row in rows]
        return cells, " ".join(out[out.index("at the end") :].split())

    return shown


def test_ranks_lists_every_layer_with_rules_scalings_and_totals_where_the_ranks_are_known(table):
    rules = "rank_map.rank_pattern={query: {rank: 8, alpha: 32, pinned: true}, value: {rank: 64, final_rank: 4}, "
    rules += "key: {lowest: 20}, attention: {lowest: 4, highest: 12}}"
    (*layers, total), end = table("schedule=after_convergence", "schedule.shared=false", rules)
    by_kind = {row[0].rpartition(".")[2]: row[2:6] + row[8:] for row in layers if "attention" in row[0]}
    assert by_kind == {
        "query": ["8", "8 (pinned)", "32", "4", "query"],
        "key": ["32", "20 (at least 20)", "64", "2", "key"],
        "value": ["64", "4", "128", "2", "value"],
        "dense": ["32", "12 (4 to 12)", "64", "2", "attention"],
    }
    assert total[0] == f"{len(layers)} layers" == "37 layers"
    # By hand: 6 encoder layers of d = 384, mlp 1536, and the pooler.
    others = 6 * 2 * (384 + 1536) + 384 + 384
    for column, in_attention, rank in ((6, 8 + 32 + 64 + 32, 32), (7, 8 + 20 + 4 + 12, 16)):
        assert total[column] == f"{6 * in_attention * (384 + 384) + rank * others:,}"
    assert end.startswith("at the end, highest rank 20, average 1")


def test_ranks_shows_bounds_and_the_pool_where_the_data_decide(table):
    rules = "rank_map.rank_pattern={query: {pinned: true}, key: {highest: 12}}"
    (*layers, total), end = table("schedule.lowest=2", "schedule.share=0.5", rules)
    ends = {row[0].rpartition(".")[2]: row[3] for row in layers}
    assert (ends["query"], ends["key"], ends["value"]) == ("32 (pinned)", "2-12", "2-32")
    # The sum of d_in + d_out over all layers is 42,240.
    assert total[7] == f"{16 * 42_240:,}"
    assert f"one pool of at most {16 * 42_240:,} parameters, 2.58 MiB in float32" in end
    slot = "a server reserves the highest rank of the adapter in every layer, up to 32; early_budget and auto have"
    assert slot in table("schedule.final_rank=8")[1]
    (*layers, total), end = table("schedule=energy")
    assert ({row[3] for row in layers}, total[7]) == ({"1-32"}, "")
    assert "pool" not in end


def test_ranks_counts_the_parameters_of_all_experts(table, tiny_moe, tiny_llama, tmp_path):
    tiny_moe("Qwen3Moe", vocab_size=600).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path)
    cells = {row[0]: row for row in table("task=text", f"task.model={tmp_path}", "lora.rank=4", "schedule=fixed")[0]}
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


def test_help_ends_quietly_when_its_reader_has_gone():
    """As in ``dynrank-train --help | head -1``."""
    command = f"'{sys.executable}' -m dynrank.train --help | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert (done.stdout.count("\n"), done.stderr) == (1, "")
