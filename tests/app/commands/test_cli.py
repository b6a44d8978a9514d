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
from dynrank.app.commands.ranks import print_ranks
from dynrank.app.runs.overrides import usage_errors
from dynrank.errors import ConfigurationError
from dynrank.output import console


def test_a_full_disk_is_a_failure_and_no_wrong_command(capsys):
    with pytest.raises(SystemExit) as caught, usage_errors():
        raise ConfigurationError("cannot write 'a.csv'") from OSError(errno.ENOSPC, "No space left on device")
    assert (caught.value.code, capsys.readouterr().err) == (1, "error: cannot write 'a.csv'\n")


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
    by_kind = {row[0].rpartition(".")[2]: row[2:6] + row[7:] for row in layers if "attention" in row[0]}
    assert by_kind == {
        "query": ["8", "8 (pinned)", "32", "4", "query"],
        "key": ["32", "20 (at least 20)", "64", "2", "key"],
        "value": ["64", "4", "128", "2", "value"],
        "dense": ["32", "12 (4 to 12)", "64", "2", "attention"],
    }
    assert total[0] == f"{len(layers)} layers" == "37 layers"
    # By hand: 6 encoder layers of d = 384, mlp 1536, and the pooler.
    others = 6 * 2 * (384 + 1536) + 384 + 384
    start, then = (
        f"{6 * in_attention * (384 + 384) + rank * others:,}"
        for in_attention, rank in ((8 + 32 + 64 + 32, 32), (8 + 20 + 4 + 12, 16))
    )
    assert total[6] == start
    assert end.startswith(f"at the end, {then} parameters, highest rank 20, average 1")


def test_ranks_shows_bounds_and_the_pool_where_the_data_decide(table):
    rules = "rank_map.rank_pattern={query: {pinned: true}, key: {highest: 12}}"
    layers, end = table("schedule.lowest=2", "schedule.share=0.5", rules)
    ends = {row[0].rpartition(".")[2]: row[3] for row in layers}
    assert (ends["query"], ends["key"], ends["value"]) == ("32 (pinned)", "2-12", "2-32")
    # The sum of d_in + d_out over all layers is 42,240.
    assert f"at the end, at most {16 * 42_240:,} parameters; the run decides each rank" in end
    layers, end = table("schedule=energy")
    assert ({row[3] for row in layers[:-1]}, end) == ({"1-32"}, "at the end, the run decides each rank")


def test_ranks_counts_all_experts(table, tiny_moe, tiny_llama, tmp_path):
    tiny_moe("Qwen3Moe", vocab_size=600).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path)
    layers, _ = table("task=text", f"task.model={tmp_path}", "lora.rank=4", "schedule=fixed")
    cells = {row[0]: row for row in layers}["model.layers.0.mlp.experts.gate_up_proj"]
    assert (cells[1], cells[2], cells[6]) == ("4 x 24 x 16", "4", f"{4 * 4 * (24 + 16)}")


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
