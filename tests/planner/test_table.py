"""``dynrank plan`` as a user runs it: table, errors, and a 70B model in little time and memory."""

import json
import re

import forked
import pytest

import dynrank
from dynrank.commands import cli
from dynrank.errors import ConfigurationError
from dynrank.planner.plan import make_plan
from dynrank.planner.table import show_plan

LAYERS = {"hidden_size": 32, "vocab_size": 50, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture
def tiny(tmp_path):
    """The override that names a config.json of a small model."""
    file = tmp_path / "tiny.json"
    size = {**LAYERS, "intermediate_size": 48, "max_position_embeddings": 32}
    file.write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"], **size}))
    return f"base={file}"


def test_parts_add_up_to_the_total_in_the_table(tiny, capsys):
    show_plan(dynrank.compose([tiny, "ranks=[4]", "sequence_length=8", "budget=1MiB"], "plan"))
    out = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in out.splitlines() if line.startswith("│")]
    ((*_, process, fits),) = rows
    weights, adapter, optimizer, gradients, activations, step, total = map(float, rows[0][3:10])
    # Each number is rounded to a tenth.
    assert weights + adapter + optimizer + step == pytest.approx(total, abs=0.25)
    assert step >= max(activations, gradients)
    libraries = float(re.search(r"process +total \+ ([\d,.]+) MiB", out)[1].replace(",", ""))
    assert float(process.replace(",", "")) == pytest.approx(total + libraries, abs=0.2)
    assert fits in ("yes", "no")


def test_a_plan_needs_no_data_and_takes_groups_of_ones_own(tiny_bert, tmp_path, launch):
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "mine.yaml").write_text(
        f"defaults: [classification, _self_]\nmodel: {tiny_bert}\nmax_length: 9\n"
    )
    code, printed, said = launch(cli.main, "plan", "task=mine", "--config-dir", tmp_path, "ranks=[4]")
    assert (code, "32 x 9 tokens" in printed) == (0, True), said
    assert "a head of two classes: data.train is not set" in printed
    code, printed, said = launch(cli.main, "ranks", "task=mine", "--config-dir", tmp_path, "lora.rank=4")
    assert (code, printed.count("│ bert."), "13 layers" in printed) == (0, 13, True), said


def test_the_budget_names_the_highest_rank_that_fits_or_says_how_much_is_lacking(tiny, capsys):
    options = [tiny, "ranks=[16,4,8]", "batch_size=2", "sequence_length=8"]
    totals = {need.rank: need.total for need in make_plan(dynrank.compose(options, "plan")).needs}
    for budget, said in (
        (totals[8], "rank 8 is the highest of these that fits"),
        (totals[8] - 1, "rank 4 is the highest of these that fits"),
        (totals[4] - 1, "none of these fits; rank 4 lacks 0.0 MiB"),
    ):
        show_plan(dynrank.compose([*options, f"budget={budget}B"], "plan"))
        assert said in capsys.readouterr().out


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["budget=lots"], ["budget", "'lots'", "24GiB"]),
        (["budget=24"], ["budget", "24", "24GiB"]),
        (["budget=0B"], ["budget", "0"]),
        (["ranks=[0]"], ["ranks", "got 0"]),
        (["ranks=[]"], ["ranks", "[]"]),
        (["ranks=[4.5]"], ["ranks", "4.5"]),
        (["ranks=[4,64]", "lora.target_modules=[q_proj]"], ["min(d_in, d_out) = 32", "got 64"]),
        (["model.quantization=int3"], ["model.quantization", "'int3'", "nf4"]),
        (["+model.dtyp=auto"], ["model.dtyp is not a configuration key", "model.dtype"]),
        (["batch_size=0"], ["batch_size", "0"]),
        (["base=lama-2-7b"], ["base", "'lama-2-7b'", "llama-2-7b"]),
        (["base=./nowhere"], ["base", "'./nowhere'"]),
        (["trainer.precision=64-true"], ["trainer.precision", "64-true"]),
        (["optimizer.name=LBFGS"], ["optimizer", "LBFGS"]),
        (["lora.target_modules=[qq_proj]"], ["lora.target_modules", "qq_proj", "q_proj"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_what_cannot_be_used_is_named(tiny, overrides, words):
    with pytest.raises(ConfigurationError) as caught:
        make_plan(dynrank.compose([tiny, "sequence_length=8", "ranks=[4]", *overrides], "plan"))
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"model_type": "nothing"}', '{"model_type": "llama", "hidden_size": "wide"}']
)
def test_a_file_that_is_no_config_is_refused(content, tmp_path):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigurationError, match=f"base={tmp_path}"):
        make_plan(dynrank.compose([f"base={tmp_path}"], "plan"))


def test_a_rank_map_shows_in_the_column_of_ranks(tiny, capsys):
    rule = "+rank_map.rank_pattern.q_proj=2"
    show_plan(dynrank.compose([tiny, rule, "ranks=[4]", "sequence_length=8"], "plan"))
    assert "4 (2-4)" in capsys.readouterr().out


PLAN = """
import resource
from dynrank.commands.cli import main
try:
    main()
finally:
    used = resource.getrusage(resource.RUSAGE_SELF)  # whose ru_maxrss may be that of the process that started this one
    (peak,) = (line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
    print(peak, used.ru_utime + used.ru_stime)
"""


def test_what_llama_70b_trains_is_planned_in_less_than_a_minute_and_2_gigabytes(tmp_path):
    options = ["base=llama-2-70b", "batch_size=1", "sequence_length=2048", "ranks=[16]", "model.dtype=auto"]
    options += ["lora.target_modules=[q_proj,v_proj]", "budget=2TB"]
    code, printed = forked.run(PLAN, "plan", *options, cwd=tmp_path)
    assert code == 0, printed
    kibibytes, seconds = map(float, printed.split()[-2:])
    assert kibibytes < 2 * 2**20
    # The seconds are processor time, because other processes may be busy, too.
    assert seconds < 60
    # Each of 80 layers trains rank * (d_in + d_out) parameters of q and of v.
    trained = 80 * 16 * ((8192 + 8192) + (8192 + 1024))
    for words in ("68,976,648,192 parameters", f"{trained:,}", "0.05%", "rank 16 is the highest of these that fits"):
        assert words in printed
    assert not list(tmp_path.iterdir())
