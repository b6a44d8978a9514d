"""A squeezed adapter is the dense SVD truncation of its source, for PEFT and here, and all else is as it was."""

import json
import os
import signal
import subprocess
import sys
import weakref

import pytest
import torch
from dynrank.adapters.stored import StoredAdapter
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import dynrank
import dynrank.adapters.squeeze
from dynrank.adapters.squeeze import squeeze_adapter
from dynrank.errors import ConfigurationError

pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to (True|False):UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
]

TINY = {"vocab_size": 20, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


class ConvNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.point = nn.Conv2d(3, 9, 3, stride=2, padding=1), nn.Conv2d(9, 8, 1, bias=False)
        self.norm, self.head = nn.BatchNorm2d(8), nn.Linear(8, 4)

    def forward(self, image):
        return self.head(self.norm(self.point(self.stem(image).relu())).mean((2, 3)))


LLAMA = LlamaConfig(**TINY, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
GPT2 = GPT2Config(**TINY, n_embd=16, n_layer=2, n_head=2, n_positions=16)
MODELS = {"llama": lambda: LlamaForCausalLM(LLAMA), "gpt2": lambda: GPT2LMHeadModel(GPT2), "conv": ConvNet}
TARGETS = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn", "c_proj", "wte"], "conv": ["stem", "point"]}
SETTINGS = {
    "plain": {},
    "rslora": {"use_rslora": True, "rank_pattern": {r".*\.1\..*|point": 4}},
    "patterns": {"rank_pattern": {"q_proj|c_attn|stem": 2}, "alpha_pattern": {r".*\.0\..*|stem": 3}},
}


def plain(kind):
    torch.manual_seed(0)
    return MODELS[kind]().eval()


def outputs(model, kind):
    with torch.no_grad():
        if kind == "conv":
            return model(torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(5)))
        return model(IDS).logits


def by_peft(kind, folder, **options):
    """An adapter of rank 6, written by PEFT, whose singular values differ."""
    options = {"r": 6, "lora_alpha": 9, "target_modules": TARGETS[kind]} | options
    if kind == "conv":
        options["modules_to_save"] = ["norm", "head"]  # with whole numbers among their tensors
    model = get_peft_model(plain(kind), LoraConfig(**options))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.4)
    model.save_pretrained(folder)
    return folder


def deltas(folder):
    """layer -> (scaling * B A in float64, flattened to a matrix; rank)."""
    with StoredAdapter(folder) as adapter:
        return {
            name: (adapter.scaling(name) * factors[0].double() @ factors[1].double(), rank)
            for name, rank in adapter.ranks.items()
            for factors in [adapter.factors(name)]
        }


def dense_truncation(delta, rank):
    u, s, vh = torch.linalg.svd(delta, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


@pytest.mark.parametrize("target", [{"rank": 3}, {"energy": 0.8}, {"budget": "50%"}], ids=str)
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("kind", MODELS)
def test_squeeze_is_the_dense_truncation_and_loads_in_peft_and_here(kind, settings, target, tmp_path):
    source = by_peft(kind, tmp_path / "source", **SETTINGS[settings])
    reports = squeeze_adapter(source, tmp_path / "out", **target)
    before, after = deltas(source), deltas(tmp_path / "out")
    assert [report.layer for report in reports] == list(before)
    for report in reports:
        (old, old_rank), (new, rank) = before[report.layer], after[report.layer]
        assert (report.rank_before, report.rank_after) == (old_rank, rank)
        assert (new - dense_truncation(old, rank)).norm() <= 1e-6 * old.norm()
        assert report.predicted_error == pytest.approx(float((new - old).norm()), abs=1e-5)
        assert report.energy_kept == pytest.approx(float(new.square().sum() / old.square().sum()), abs=1e-5)
    assert any(report.rank_after < report.rank_before for report in reports)

    theirs = outputs(PeftModel.from_pretrained(plain(kind), tmp_path / "out").eval(), kind)
    ours = outputs(dynrank.load_adapter(plain(kind), tmp_path / "out"), kind)
    assert (theirs - ours).abs().max() <= 1e-5
    whole = outputs(dynrank.load_adapter(plain(kind), source), kind)
    assert (ours - whole).abs().max() > 1e-4
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [CONFIG, WEIGHTS]


@pytest.mark.parametrize("kind", MODELS)
def test_squeeze_to_a_rank_that_no_layer_exceeds_copies_bit_for_bit(kind, tmp_path):
    source = by_peft(kind, tmp_path / "source", use_rslora=True, rank_pattern={TARGETS[kind][0]: 2})
    assert all(report.energy_kept == 1.0 for report in squeeze_adapter(source, tmp_path / "out", rank=6))
    old, new = (load_file(folder / WEIGHTS) for folder in (source, tmp_path / "out"))
    assert all(torch.equal(new[key], old[key]) for key in old)
    assert set(new) == set(old)
    expected = outputs(PeftModel.from_pretrained(plain(kind), source).eval(), kind)
    assert (outputs(dynrank.load_adapter(plain(kind), tmp_path / "out"), kind) - expected).abs().max() <= 1e-5


def test_squeeze_keeps_what_it_does_not_change(tmp_path):
    source = by_peft("conv", tmp_path / "source", rank_pattern={"point": 2}, lora_dropout=0.25, revision="abc")
    edit_config(source, base_model_name_or_path="some/base", task_type="FEATURE_EXTRACTION")
    squeeze_adapter(source, tmp_path / "out", rank=3)
    old, new = (load_file(folder / WEIGHTS) for folder in (source, tmp_path / "out"))
    same = {key for key in old if old[key].shape == new[key].shape and torch.equal(old[key], new[key])}
    assert same == {key for key in old if "stem" not in key}
    assert any(old[key].dtype == torch.int64 for key in same)
    before, after = (json.loads((folder / CONFIG).read_text()) for folder in (source, tmp_path / "out"))
    changed = {"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"}
    assert {k: v for k, v in before.items() if k not in changed} == {k: v for k, v in after.items() if k not in changed}
    assert (after["r"], after["rank_pattern"]) == (3, {"^point": 2})
    assert (after["lora_alpha"], after["alpha_pattern"]) == (4.5, {"^point": 9})  # 9 / 6 * 3, and 9 / 2 * 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_squeeze_keeps_the_dtype_of_each_factor(dtype, tmp_path):
    source = by_peft("llama", tmp_path / "source")
    edit_tensors(source, lambda t: t.update({k: v.to(dtype) for k, v in t.items() if "lora_B" in k}))
    squeeze_adapter(source, tmp_path / "out", rank=2)
    for key, value in load_file(tmp_path / "out" / WEIGHTS).items():
        assert value.dtype == (dtype if "lora_B" in key else torch.float32)
    for (old, _), (new, _) in zip(deltas(source).values(), deltas(tmp_path / "out").values(), strict=True):
        tolerance = max(1e-6, 2 * torch.finfo(dtype).eps)
        assert (new - dense_truncation(old, 2)).norm() <= tolerance * old.norm()


def test_energy_takes_the_lowest_rank_that_keeps_the_share(tmp_path):
    source = by_peft("llama", tmp_path / "source")
    for report in squeeze_adapter(source, tmp_path / "a", energy=0.85):
        energy = torch.tensor(report.singular_values).square()
        share = energy.cumsum(0) / energy.sum()
        assert share[report.rank_after - 1] >= 0.85 > (share[report.rank_after - 2] if report.rank_after > 1 else 0)
    assert {r.rank_after for r in squeeze_adapter(source, tmp_path / "b", energy=1.0)} == {6}
    assert {r.rank_after for r in squeeze_adapter(source, tmp_path / "c", energy=0.01, lowest=2, multiple=4)} == {4}
    assert {r.rank_after for r in squeeze_adapter(source, tmp_path / "d", energy=0.999, multiple=4)} == {6}  # not 8


@pytest.mark.parametrize("budget", ["50%", "0.5", 0.5, 432, "432", "4_32"])
def test_budget_is_a_count_or_a_share_of_parameters(budget, tmp_path):
    source = by_peft("llama", tmp_path / "source")  # 2 x 6 x (16 + 16 + 16 + 24) = 864 parameters
    edit_config(source, alpha_pattern={"q_proj": 40})
    reports = squeeze_adapter(source, tmp_path / "out", budget=budget)
    total = sum(tensor.numel() for tensor in load_file(tmp_path / "out" / WEIGHTS).values())
    assert sum(r.parameters_before - r.parameters_saved for r in reports) == total
    assert 432 - 40 < total <= 432
    q_proj, down_proj = ([r.rank_after for r in reports if r.layer.endswith(kind)] for kind in TARGETS["llama"])
    assert min(q_proj) > max(down_proj)  # where the scaling is large, a direction is worth more


def test_budget_respects_lowest_and_multiple(tmp_path):
    source = by_peft("llama", tmp_path / "source", rank_pattern={r"layers\.0\..*q_proj": 1})
    reports = squeeze_adapter(source, tmp_path / "out", budget="70%", lowest=2, multiple=2)
    low, *others = sorted(report.rank_after for report in reports)
    assert low == 1  # it was lower than the lowest
    assert set(others) <= {2, 4, 6}
    with pytest.raises(ConfigurationError, match="--budget 20% cannot be met.* at least .* got"):
        squeeze_adapter(source, tmp_path / "other", budget="20%", lowest=2)


def test_squeeze_of_a_fresh_adapter_can_still_learn(tmp_path):
    get_peft_model(plain("llama"), LoraConfig(r=6, target_modules=["q_proj"])).save_pretrained(tmp_path / "source")
    for number, target in enumerate(({"rank": 2}, {"energy": 0.9}, {"budget": 10**6})):
        reports = squeeze_adapter(tmp_path / "source", tmp_path / f"out{number}", **target)
        assert {r.energy_kept for r in reports} == {1.0}
        tensors = load_file(tmp_path / f"out{number}" / WEIGHTS)
        assert all(bool(value.any()) == ("lora_A" in key) for key, value in tensors.items())


def test_squeeze_holds_one_pair_of_factors_at_a_time(tmp_path, monkeypatch):
    source, alive, read = by_peft("llama", tmp_path / "source"), weakref.WeakSet(), StoredAdapter.factors

    def spy(adapter, name):
        assert not alive
        pair = read(adapter, name)
        alive.update(pair)
        return pair

    monkeypatch.setattr(StoredAdapter, "factors", spy)
    squeeze_adapter(source, tmp_path / "a", rank=2)
    squeeze_adapter(source, tmp_path / "b", energy=0.9)


def edit_config(folder, **changes):
    file = folder / CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_tensors(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


Q_A = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
BROKEN = {
    "cut off": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-9]), "not a whole safetensors file"),
    "pickle": (lambda f: (f / WEIGHTS).rename(f / "adapter_model.bin"), r"pickled adapters \(.bin\) are not read"),
    "no config": (lambda f: (f / CONFIG).unlink(), "cannot read the adapter"),
    "foreign": (lambda f: save_file({"x.lora_A.weight": torch.ones(2, 2)}, f / WEIGHTS), "is no PEFT key"),
    "no factors": (lambda f: save_file({"base_model.model.x": torch.ones(2)}, f / WEIGHTS), "holds no LoRA factors"),
    "NaN": (lambda f: edit_tensors(f, lambda t: t[Q_A].fill_(float("nan"))), r"layers\.1.*q_proj' holds NaN"),
    "half a pair": (lambda f: edit_tensors(f, lambda t: t.pop(Q_A)), "q_proj' lacks two factors"),
    "shape": (lambda f: edit_tensors(f, lambda t: t.update({Q_A: torch.ones(3, 9)})), r"\[3, 9\] and \[16, 6\]"),
    "whole numbers": (lambda f: edit_tensors(f, lambda t: t.update({Q_A: torch.ones(6, 16).int()})), "got I32"),
    "LoRA bias": (
        lambda f: edit_tensors(f, lambda t: t.update({Q_A.replace("A.weight", "B.bias"): torch.ones(3)})),
        "q_proj.lora_B.bias' is a LoRA tensor of an unknown kind",
    ),
    "DoRA": (lambda f: edit_config(f, use_dora=True), "use_dora must be unset"),
    "no LoRA": (lambda f: edit_config(f, peft_type="LOHA"), "peft_type must be LORA, got 'LOHA'"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_squeeze_refuses_a_faulty_adapter_and_leaves_nothing(fault, tmp_path):
    source = by_peft("llama", tmp_path / "source")
    break_it, message = BROKEN[fault]
    break_it(source)
    with pytest.raises(ConfigurationError, match=message):
        squeeze_adapter(source, tmp_path / "out", rank=2)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_squeeze_refuses_an_out_that_is_not_free(tmp_path):
    source = by_peft("llama", tmp_path / "source")
    for out in (source, source / ".." / "source"):
        with pytest.raises(ConfigurationError, match="--out must be another folder"):
            squeeze_adapter(source, out, rank=2)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "mine").write_text("mine")
    for out in (tmp_path / "used", tmp_path / "used" / "mine"):
        with pytest.raises(ConfigurationError, match="--out must be a new or empty folder"):
            squeeze_adapter(source, out, rank=2)
    with pytest.raises(ConfigurationError, match="cannot write to --out"):
        squeeze_adapter(source, tmp_path / "used" / "mine" / "below", rank=2)
    assert [path.name for path in (tmp_path / "used").iterdir()] == ["mine"]
    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "empty", tmp_path / "new" / "deep"):
        squeeze_adapter(source, out, rank=2)
        assert len(deltas(out)) == 4


def test_squeeze_that_fails_in_the_middle_leaves_nothing(tmp_path, monkeypatch):
    source, calls = by_peft("llama", tmp_path / "source"), []

    def full_disk(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        return truncate(*arguments)

    truncate = dynrank.adapters.squeeze.truncate_product
    monkeypatch.setattr(dynrank.adapters.squeeze, "truncate_product", full_disk)
    with pytest.raises(ConfigurationError, match="cannot write to --out .*No space left"):
        squeeze_adapter(source, tmp_path / "out", rank=2)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_squeeze_leaves_an_out_alone_that_another_is_writing(tmp_path, monkeypatch):
    source, out, seen = by_peft("llama", tmp_path / "source"), tmp_path / "out", []

    def meanwhile(*arguments):
        monkeypatch.undo()
        with pytest.raises(ConfigurationError, match="no other process writes to"):
            squeeze_adapter(source, out, rank=1)
        seen.append(sorted(path.name for path in tmp_path.iterdir()))
        return truncate(*arguments)

    truncate = dynrank.adapters.squeeze.truncate_product
    monkeypatch.setattr(dynrank.adapters.squeeze, "truncate_product", meanwhile)
    squeeze_adapter(source, out, rank=2)
    assert seen == [[".out.part", "source"]]
    assert {rank for _, rank in deltas(out).values()} == {2}


KILLED = """
import os, signal, sys, dynrank.adapters.squeeze as squeeze
report, done = squeeze._report, []
def killed(*arguments):
    done.append(arguments)
    assert "peft" not in sys.modules and "lightning" not in sys.modules
    return report(*arguments) if len(done) < 3 else os.kill(os.getpid(), signal.SIGKILL)
squeeze._report = killed
squeeze.squeeze_adapter(sys.argv[1], sys.argv[2], rank=2)
"""


def test_squeeze_that_is_killed_leaves_nothing_that_looks_whole(tmp_path):
    source, out = by_peft("llama", tmp_path / "source"), tmp_path / "out"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", KILLED, source, out], env=environment, timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL
    assert not out.exists()
    assert list(tmp_path.rglob(CONFIG)) == [source / CONFIG]
    squeeze_adapter(source, out, rank=2)  # goes over what was left
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]
    assert {rank for _, rank in deltas(out).values()} == {2}
