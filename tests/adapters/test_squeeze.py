"""A squeezed adapter is the dense SVD truncation of its source, for PEFT and here, and all else is as it was.

``inspect`` says what the dense updates say.
"""

import json

import pytest
import rich
import torch
from dense import truncation
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from trained import updated

import dynrank
from dynrank.adapters.squeeze import squeeze
from dynrank.errors import ConfigurationError

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
SETTINGS = {
    # PEFT makes such factors at even ranks only.
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "rslora": {"use_rslora": True, "rank_pattern": {r".*\.1\..*|point": 4}},
    "patterns": {"rank_pattern": {"q_proj|c_attn|stem": 2}, "alpha_pattern": {r".*\.0\..*|stem": 3}},
}


@pytest.fixture
def by_peft(zoo, tmp_path):
    """Writes an adapter of rank 6 and alpha 9 with PEFT; its folder."""

    def write(kind, **options):
        zoo.by_peft(kind, tmp_path / "source", **({"r": 6, "lora_alpha": 9} | options))
        return tmp_path / "source"

    return write


def deltas(folder):
    """layer -> (scaling * B A in float64, flattened to a matrix; rank)."""
    adapter = dynrank.read_adapter(folder)
    found = {}
    for name, layer in adapter.layers.items():
        lora_B, lora_A = adapter.factors(name)
        found[name] = layer.scaling * lora_B.double() @ lora_A.double(), layer.rank
    return found


@pytest.mark.parametrize(
    ("kind", "settings", "target"),
    [
        ("llama", "orthogonal", {"energy": 0.8}),
        ("gpt2", "rslora", {"budget": "50%"}),
        ("conv", "rslora", {"rank": 3}),
        ("conv", "patterns", {"energy": 0.8}),
    ],
)
def test_squeeze_is_the_dense_truncation_and_loads_in_peft_and_here(kind, settings, target, by_peft, zoo, tmp_path):
    source = by_peft(kind, **SETTINGS[settings])
    reports = squeeze(source, tmp_path / "out", **target)
    before = deltas(source)
    after = deltas(tmp_path / "out")
    assert [report.layer for report in reports] == list(before)
    for report in reports:
        old, old_rank = before[report.layer]
        new, rank = after[report.layer]
        assert (report.rank_before, report.rank_after) == (old_rank, rank)
        assert (new - truncation(old, rank)).norm() <= 1e-6 * old.norm()
        assert report.predicted_error == pytest.approx(float((new - old).norm()), abs=1e-5)
        assert report.energy_kept == pytest.approx(float(new.square().sum() / old.square().sum()), abs=1e-5)
    assert any(report.rank_after < report.rank_before for report in reports)

    theirs = zoo.outputs(PeftModel.from_pretrained(zoo.plain(kind), tmp_path / "out").eval())
    ours = zoo.outputs(dynrank.load_adapter(zoo.plain(kind), tmp_path / "out"))
    assert (theirs - ours).abs().max() <= 1e-5
    assert (ours - zoo.outputs(dynrank.load_adapter(zoo.plain(kind), source))).abs().max() > 1e-4
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [CONFIG, WEIGHTS]


def test_squeeze_keeps_what_it_does_not_change(by_peft, zoo, tmp_path):
    source = by_peft("conv", rank_pattern={"point": 2}, lora_dropout=0.25, revision="abc")
    zoo.edit_config(source, base_model_name_or_path="some/base", task_type="FEATURE_EXTRACTION")
    squeeze(source, tmp_path / "out", rank=3)
    old, new = (load_file(folder / WEIGHTS) for folder in (source, tmp_path / "out"))
    same = {key for key in old if old[key].shape == new[key].shape and torch.equal(old[key], new[key])}
    assert same == {key for key in old if "stem" not in key}
    assert any(old[key].dtype == torch.int64 for key in same)
    before, after = (json.loads((folder / CONFIG).read_text()) for folder in (source, tmp_path / "out"))
    changed = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"}
    assert {k: v for k, v in before.items() if k not in changed} == {k: v for k, v in after.items() if k not in changed}
    assert (after["r"], after["rank_pattern"]) == (3, {"^point": 2})
    # The scalings stay 9 / 6 and 9 / 2.
    assert (after["lora_alpha"], after["alpha_pattern"]) == (4.5, {"^point": 9})


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_squeeze_keeps_the_dtype_of_each_factor(dtype, by_peft, zoo, tmp_path):
    source = by_peft("llama")
    zoo.edit_tensors(source, lambda t: t.update({k: v.to(dtype) for k, v in t.items() if "lora_B" in k}))
    squeeze(source, tmp_path / "out", rank=2)
    for key, value in load_file(tmp_path / "out" / WEIGHTS).items():
        assert value.dtype == (dtype if "lora_B" in key else torch.float32)
    for (old, _), (new, _) in zip(deltas(source).values(), deltas(tmp_path / "out").values(), strict=True):
        tolerance = max(1e-6, 2 * torch.finfo(dtype).eps)
        assert (new - truncation(old, 2)).norm() <= tolerance * old.norm()


@pytest.mark.parametrize("budget", ["50%", 0.5, 312])
def test_budget_is_a_count_or_a_share_of_parameters(budget, by_peft, zoo, tmp_path):
    # The adapter has 2 x 6 x (8 + 8 + 8 + 8 + 12 + 8) = 624 parameters.
    source = by_peft("llama")
    zoo.edit_config(source, alpha_pattern={"q_proj": 40})
    reports = squeeze(source, tmp_path / "out", budget=budget)
    total = sum(tensor.numel() for tensor in load_file(tmp_path / "out" / WEIGHTS).values())
    assert sum(r.rank_after * r.params_per_rank for r in reports) == total
    assert 312 - 20 < total <= 312
    q_proj, down_proj = ([r.rank_after for r in reports if r.layer.endswith(kind)] for kind in ("q_proj", "down_proj"))
    # A direction is worth more where the scaling is large.
    assert min(q_proj) > max(down_proj)
    # 623.99 parameters are not 624.
    assert any(r.rank_after < r.rank_before for r in squeeze(source, tmp_path / "most", budget=0.99999))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give one of rank, energy and budget, got none"),
        ({"rank": 0}, "rank must be a whole number of at least 1, got 0"),
        ({"energy": 2}, r"energy must be a share in \(0, 1\], got 2"),
        ({"budget": 100}, r"budget must be at least 104 parameters \(rank 1\), got 100"),
    ],
)
def test_sizes_that_cannot_be_are_refused_in_the_words_of_the_call(options, message, by_peft, tmp_path):
    with pytest.raises(ConfigurationError, match=f"^{message}"):
        squeeze(by_peft("llama"), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_share_keeps_the_direction_that_rounding_would_lose(tmp_path):
    """57 of 100 directions are a share of 0.57, although 0.57 of their 20,000 parameters is below 11,400 in floats."""
    model = updated(dynrank.add_lora(nn.Sequential(nn.Linear(100, 100)), rank=100, target_modules=["0"]))
    dynrank.save_adapter(model, tmp_path / "source")
    (report,) = squeeze(tmp_path / "source", tmp_path / "out", budget=0.57)
    assert report.rank_after == 57


def test_a_fresh_adapter_has_zeros_and_can_still_learn_after_a_squeeze(zoo, launch, tmp_path):
    source = tmp_path / "source"
    get_peft_model(zoo.plain("llama"), LoraConfig(r=6, target_modules=["q_proj"])).save_pretrained(source)
    assert [(layer.energy_rank(0.9), layer.effective_rank) for layer in dynrank.inspect(source)] == [(0, 0.0)] * 2
    assert launch("inspect", source, "--plot", tmp_path / "zero.png")[0] == 0
    for number, target in enumerate(({"rank": 2}, {"energy": 0.9}, {"budget": 10**6})):
        reports = squeeze(source, tmp_path / f"out{number}", **target)
        assert {r.energy_kept for r in reports} == {1.0}
        tensors = load_file(tmp_path / f"out{number}" / WEIGHTS)
        assert all(bool(value.any()) == ("lora_A" in key) for key, value in tensors.items())


def test_ranks_above_those_that_a_layer_can_have_are_lowered(zoo, launch, tmp_path):
    """A share is of the stored numbers all the same."""
    model = zoo.by_peft("conv", tmp_path / "source", r=12)
    assert [(layer.rank, layer.stored_rank) for layer in dynrank.inspect(tmp_path / "source")] == [(8, 12), (9, 12)]
    squeeze(tmp_path / "source", tmp_path / "out", energy=1.0)
    back = dynrank.load_adapter(zoo.plain("conv"), tmp_path / "out")
    assert (zoo.outputs(back) - zoo.outputs(model)).abs().max() <= 1e-5
    code, printed, _ = launch("squeeze", tmp_path / "source", "--budget", "50%", "--out", tmp_path / "small")
    assert code == 0
    before, after = (
        sum(value.numel() for key, value in load_file(tmp_path / place / WEIGHTS).items() if "lora_" in key)
        for place in ("source", "small")
    )
    assert f"parameters       {before:,} → {after:,} ({after / before:.1%})" in printed
    assert str(tmp_path / "small") in printed
    assert 0.4 * before < after <= 0.5 * before


@pytest.fixture
def blocks(tmp_path):
    """(model of eleven blocks with two kinds of layers each, the folder of a run with its adapter)."""
    torch.manual_seed(0)
    layers = [nn.ModuleDict({"up": nn.Linear(6, 10), "down": nn.Linear(10, 6)}) for _ in range(11)]
    model = updated(dynrank.add_lora(nn.ModuleDict({"layers": nn.ModuleList(layers)}), rank=4, alpha=6))
    dynrank.save_adapter(model, tmp_path / "run" / "adapter")
    return model, tmp_path / "run"


def test_inspect_agrees_with_the_dense_updates(blocks):
    model, run = blocks
    layers = dict(dynrank.lora_layers(model))
    found = dynrank.inspect(run)
    assert [layer.layer for layer in found] == [f"layers.{i}.{kind}" for i in range(11) for kind in ("down", "up")]
    for spectrum in found:
        delta = layers[spectrum.layer].delta_weight().detach().double()
        values = torch.linalg.svdvals(delta)[:4]
        assert (spectrum.shape, spectrum.rank, spectrum.alpha, spectrum.scaling) == (tuple(delta.shape), 4, 6, 1.5)
        assert spectrum.parameters == 4 * 16
        assert spectrum.singular_values == pytest.approx(values.tolist(), rel=1e-5)
        share = values.square().cumsum(0) / values.square().sum()
        assert spectrum.energy_rank(0.9) == 1 + int((share < 0.9).sum())
        p = values / values.sum()
        assert spectrum.effective_rank == pytest.approx(float((-p * p.log()).sum().exp()))


def test_commands_take_the_folder_of_a_run_and_inspect_draws_all_layers(blocks, launch, tmp_path):
    run = blocks[1]
    code, printed, _ = launch("inspect", run, "--plot", tmp_path / "a.png")
    assert code == 0
    lines = [line.strip("│").split("│") for line in printed.splitlines() if line.startswith("│")]
    rows = [[cell.strip() for cell in line] for line in lines]
    assert rows[0][:5] == ["layers.0.down", "6 x 10", "4", "6", "1.5"]
    assert f"22 layers, {22 * 4 * 16:,} parameters" in printed
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert launch("squeeze", run, "--rank", 1, "--out", tmp_path / "small")[0] == 0


def test_stored_adapters_are_short_tables_in_a_session_and_lists(tmp_path, capsys):
    blocks = [nn.ModuleDict({kind: nn.Linear(6, 6) for kind in ("q_proj", "up_proj")}) for _ in range(40)]
    net = nn.ModuleDict({"layers": nn.ModuleList(blocks)})
    model = updated(dynrank.add_lora(net, rank=4, alpha=4, rank_map={r"0\..*": 2}))
    dynrank.save_adapter(model, tmp_path / "adapter")
    for layers, ranks, total in (
        (dynrank.inspect(tmp_path / "adapter"), "2-4", 12 * (78 * 4 + 2 * 2)),
        (squeeze(tmp_path / "adapter", tmp_path / "small", rank=2), "2-4 → 2", 12 * 78 * 2),
    ):
        assert isinstance(layers, list)
        assert len(layers) == 80
        assert len(repr(layers).splitlines()) < 20
        rich.print(layers.table())
        printed = " ".join(capsys.readouterr().out.split())
        assert f"│ all │ 80 │ {ranks} │" in printed
        assert f"{total:,} │" in printed
