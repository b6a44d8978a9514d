"""The same update in fewer bits: PEFT computes what the file says, the file is as small as it should, and we read it.

References are the numbers of the file in dense float64, and the update before it was rounded.
"""

import json
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import dynrank
from dynrank.adapters.precision import in_dtype, in_float8
from dynrank.adapters.squeeze import squeeze
from dynrank.app.models.merging import merge_adapter
from dynrank.errors import ConfigurationError
from dynrank.linalg import joined, products

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
FLOAT8 = torch.float8_e4m3fn
SETTINGS = {
    "rslora": {"use_rslora": True, "rank_pattern": {r".*\.1\..*|point": 4}},
    "patterns": {"rank_pattern": {"q_proj|c_attn|stem": 2}, "alpha_pattern": {r".*\.0\..*|stem": 3}},
}


def stored_updates(folder):
    """{key of lora_A: (B, A, scaling)} in float64, by the files alone: PEFT's patterns, alpha over rank or its root."""
    config = json.loads((folder / CONFIG).read_text())
    tensors = load_file(folder / WEIGHTS)
    found = {}
    for key in tensors:
        if "lora_A" in key or "lora_embedding_A" in key:
            name = re.sub(r"^base_model\.model\.|\.lora_(embedding_)?A.*", "", key)
            ranks, alphas = (
                [value for pattern, value in (config[which] or {}).items() if re.match(rf"(.*\.)?({pattern})$", name)]
                for which in ("rank_pattern", "alpha_pattern")
            )
            rank = (ranks or [config["r"]])[0]
            alpha = (alphas or [config["lora_alpha"]])[0]
            lora_A, lora_B = (
                tensors[k].double().flatten(1) for k in (key, re.sub("(lora_(embedding_)?)A", r"\1B", key))
            )
            found[name] = lora_B, lora_A, alpha / (rank**0.5 if config["use_rslora"] else rank)
    return found


def dense(folder, model):
    """``model`` in float64 with the updates and heads of the file added to its weights, by hand."""
    model = model.double()
    tensors = load_file(folder / WEIGHTS)
    with torch.no_grad():
        for name, (lora_B, lora_A, scaling) in stored_updates(folder).items():
            layer = model.get_submodule(name)
            update = scaling * lora_B @ lora_A
            if type(layer).__name__ in ("Conv1D", "Embedding"):
                update = update.T
            # A copy, since the embedding may be tied to the head.
            layer.weight = nn.Parameter(layer.weight + update.view_as(layer.weight))
        for key, value in tensors.items():
            if "lora_" not in key and ".base_layer." not in key:
                name, _, leaf = key.removeprefix("base_model.model.").rpartition(".")
                getattr(model.get_submodule(name), leaf).copy_(value)
    return model


@pytest.mark.parametrize("dtype", [torch.bfloat16, FLOAT8])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "conv"])
@pytest.mark.parametrize("options", SETTINGS)
def test_peft_computes_what_the_file_says_which_is_nearly_the_update(options, kind, dtype, zoo, tmp_path):
    zoo.by_peft(kind, tmp_path / "source", **({"r": 6, "lora_alpha": 9} | SETTINGS[options]))
    done = squeeze(tmp_path / "source", tmp_path / "out", dtype=dtype)
    reference = zoo.outputs(dense(tmp_path / "out", zoo.plain(kind)))
    theirs = zoo.outputs(PeftModel.from_pretrained(zoo.plain(kind), tmp_path / "out").eval())
    ours = zoo.outputs(dynrank.load_adapter(zoo.plain(kind), tmp_path / "out"))
    for logits in (theirs, ours):
        assert (logits - reference).abs().max() <= 2e-6 * reference.abs().max() + 2e-6
    before = stored_updates(tmp_path / "source")
    after = stored_updates(tmp_path / "out")
    norms = []
    for name, (lora_B, lora_A, scaling) in after.items():
        old_B, old_A, old_scaling = before[name]
        update = old_scaling * old_B @ old_A
        norms.append((float((scaling * lora_B @ lora_A - update).norm()), float(update.norm())))
        assert done.rounding.layers[name] == pytest.approx(norms[-1][0] / norms[-1][1], rel=1e-3)
        assert norms[-1][0] <= (0.06 if dtype == FLOAT8 else 0.005) * norms[-1][1]
    errors, sizes = map(torch.tensor, zip(*norms, strict=True))
    assert done.rounding.whole == pytest.approx(float(errors.norm() / sizes.norm()), rel=1e-3)
    assert [report.rank_after for report in done] == [report.rank_before for report in done]
    for key, value in load_file(tmp_path / "out" / WEIGHTS).items():
        # PEFT stores the base's own embedding, too; and a head has no scaling.
        kept = torch.float32 if ".base_layer." in key else torch.bfloat16 if "lora_" not in key else dtype
        assert value.dtype == (kept if value.is_floating_point() else torch.int64), key


def test_experts_have_one_power_for_all_their_products(tiny_moe, tmp_path):
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    peft = get_peft_model(tiny_moe("Qwen3Moe"), LoraConfig(r=3, lora_alpha=5, target_parameters=experts))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in peft.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    peft.save_pretrained(tmp_path / "source")
    done = squeeze(tmp_path / "source", tmp_path / "out", dtype=FLOAT8)
    assert 0.01 < done.rounding.whole < 0.06
    ids = {"input_ids": torch.tensor([[3, 1, 4, 1, 5]])}
    with torch.no_grad():
        theirs = PeftModel.from_pretrained(tiny_moe("Qwen3Moe"), tmp_path / "out").eval()(**ids).logits
        ours = dynrank.load_adapter(tiny_moe("Qwen3Moe"), tmp_path / "out").eval()(**ids).logits
        plain = tiny_moe("Qwen3Moe")(**ids).logits
        unrounded = peft.eval()(**ids).logits
    assert (theirs - ours).abs().max() <= 1e-5
    assert (theirs - unrounded).norm() <= 0.1 * (plain - unrounded).norm()


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    sizes=st.tuples(st.integers(24, 90), st.integers(24, 90), st.integers(1, 8)),
    count=st.integers(1, 3),
    spread=st.floats(0, 4),
    scales=st.tuples(st.integers(-18, 12), st.integers(-18, 12)),
    mixed=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_any_update_keeps_its_size_in_float8_and_is_rounded_only_once(sizes, count, spread, scales, mixed, seed):
    """Factors of any size and basis: with directions that nearly cancel each other, too."""
    generator = torch.Generator().manual_seed(seed)
    d_out, d_in, rank = sizes

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    weights = 10 ** torch.linspace(0, -spread, rank, dtype=torch.float64)
    # Condition numbers of such a basis reach 10^3.
    bases = [torch.linalg.qr(normal(rank, rank)).Q * 10 ** normal(rank) if mixed else torch.eye(rank).double()] * count
    pairs = [(normal(d_out, rank) * weights @ m, torch.linalg.inv(m) @ normal(rank, d_in)) for m in bases]
    lora_B = joined(torch.stack([(b * 10.0 ** scales[0]).mT for b, _ in pairs]), 1).float()
    lora_A = joined(torch.stack([a * 10.0 ** scales[1] for _, a in pairs]), 0).float()
    new = in_dtype(lora_B, lora_A, FLOAT8, count)

    def product(b, a):
        return torch.stack([x @ y for x, y in products(b.double(), a.double(), count)])

    before = product(lora_B, lora_A)
    rounded = new.lora_B.float() * 2.0**-new.power, new.lora_A.float() * 2.0**-new.power
    error = float((product(*rounded) - before).norm())
    assert error <= 0.06 * before.norm()
    assert (new.error, new.norm) == pytest.approx((error, float(before.norm())), rel=1e-6)
    again = in_float8(*rounded, count)
    assert again[2] == new.power
    assert all(
        torch.equal(one.float(), other.float()) for one, other in zip(again, (new.lora_B, new.lora_A), strict=False)
    )


def test_what_is_not_trained_yet_stays_so(tmp_path):
    model = dynrank.add_lora(nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 20)), rank=4)
    with torch.no_grad():
        model[1].lora_A.zero_()
    rounding = dynrank.save_adapter(model, tmp_path, dtype=FLOAT8)
    assert (rounding.whole, {*rounding.layers.values()}) == (0.0, {0.0})
    back = dynrank.read_adapter(tmp_path)
    (b0, a0), (b1, a1) = (back.factors(name) for name in "01")
    assert not b0.any()
    assert not b1.any()
    assert not a1.any()
    # Directions with a row of A can still be trained.
    assert (a0.norm(dim=1) > 0).all()


def test_sizes_hold_and_reading_undoes_the_power(tmp_path):
    torch.manual_seed(0)
    model = dynrank.add_lora(nn.Sequential(nn.Linear(384, 384), nn.Linear(384, 1536)), rank=16, alpha=24)
    with torch.no_grad():
        for _, layer in dynrank.lora_layers(model):
            layer.lora_B.normal_(std=0.02)
    sizes = {}
    for name, dtype in (("a", None), ("b", torch.float32), ("c", torch.bfloat16), ("d", FLOAT8)):
        rounding = dynrank.save_adapter(model, tmp_path / name, dtype=dtype)
        assert (rounding is None) == (dtype is None)
        assert {file.name for file in (tmp_path / name).iterdir()} == {CONFIG, WEIGHTS}
        sizes[name] = (tmp_path / name / WEIGHTS).stat().st_size
    assert sizes["a"] == sizes["b"]
    assert sizes["c"] <= 0.52 * sizes["a"]
    assert sizes["d"] <= 0.27 * sizes["a"]
    assert json.loads((tmp_path / "a" / CONFIG).read_text()) == json.loads((tmp_path / "b" / CONFIG).read_text())
    # The file has a smaller alpha; for those who go on from it, alpha and factors are as in the model.
    assert json.loads((tmp_path / "d" / CONFIG).read_text())["lora_alpha"] < 0.1
    back = dynrank.read_adapter(tmp_path / "d")
    for name, layer in dynrank.lora_layers(model):
        assert (back.layers[name].alpha, back.layers[name].scaling) == (24, 1.5)
        lora_B, lora_A = back.factors(name)
        assert lora_A.dtype == torch.float32
        assert 0.2 < lora_A.norm() * lora_B.norm() / (layer.lora_A.norm() * layer.lora_B.norm()) < 5
    assert [(layer.alpha, layer.rank) for layer in dynrank.inspect(tmp_path / "d")] == [(24, 16)] * 2


def test_a_file_in_float8_stays_bit_for_bit_unless_a_dtype_is_asked_for(zoo, tmp_path):
    zoo.by_peft("bert", tmp_path / "source", rank_pattern={"query": 2}, alpha_pattern={"value": 1})
    squeeze(tmp_path / "source", tmp_path / "one", dtype=FLOAT8)
    again = squeeze(tmp_path / "one", tmp_path / "two", rank=2)
    changed = {report.layer for report in again if report.rank_after < report.rank_before}
    assert 0 < len(changed) < len(again)
    one, two = (load_file(tmp_path / place / WEIGHTS) for place in ("one", "two"))
    for key, value in two.items():
        assert value.dtype == one[key].dtype
        same = value.shape == one[key].shape and torch.equal(value.float(), one[key].float())
        assert same == (not any(f".{name}.lora" in key for name in changed))
    squeeze(tmp_path / "one", tmp_path / "wide", dtype=torch.float32)
    source, wide = (json.loads((tmp_path / place / CONFIG).read_text()) for place in ("source", "wide"))
    assert (wide["r"], wide["lora_alpha"]) == (source["r"], source["lora_alpha"])
    logits = [zoo.outputs(dynrank.load_adapter(zoo.plain("bert"), tmp_path / place)) for place in ("one", "wide")]
    assert (logits[0] - logits[1]).abs().max() <= 1e-6


def test_every_reader_takes_a_file_in_float8_also_one_of_another_program(zoo, launch, tmp_path):
    """Another program has no powers in its metadata."""
    source = zoo.saved(tmp_path / "source", "llama", rank_map={"q_proj": {"rank": 2, "alpha": 40}})
    zoo.plain("llama").save_pretrained(tmp_path / "base")
    foreign = tmp_path / "foreign"
    squeeze(source, foreign, dtype=FLOAT8)
    save_file(load_file(foreign / WEIGHTS), foreign / WEIGHTS, metadata={"format": "pt"})
    dynrank.save_adapter(dynrank.load_adapter(zoo.plain("llama"), source), tmp_path / "ours", dtype=FLOAT8)
    theirs = PeftModel.from_pretrained(zoo.plain("llama"), foreign).eval()
    for place in (foreign, tmp_path / "ours"):
        expected = zoo.outputs(dense(place, zoo.plain("llama")))
        model = dynrank.swap_adapter(zoo.adapted("llama", 3), place)
        assert (zoo.outputs(model) - expected).abs().max() <= 1e-6
        merged = merge_adapter(place, str(tmp_path / "base"), tmp_path / f"merged {place.name}")
        assert (zoo.outputs(merged) - expected).abs().max() <= 1e-6
        values = torch.tensor(dynrank.inspect(place)[0].singular_values)
        lora_B, lora_A, scaling = next(iter(sorted(stored_updates(place).items())))[1]
        assert values.tolist() == pytest.approx(
            (scaling * torch.linalg.svdvals(lora_B @ lora_A))[: len(values)].tolist()
        )
        assert launch("inspect", place)[0] == 0
        dynrank.export_adapter(place, tmp_path / f"gguf {place.name}", to="gguf", model=str(tmp_path / "base"))
        dynrank.export_adapter(place, tmp_path / f"vllm {place.name}", to="vllm")
        exported = load_file(tmp_path / f"vllm {place.name}" / WEIGHTS)
        assert {value.dtype for value in exported.values()} == {torch.bfloat16}
    assert (zoo.outputs(theirs) - zoo.outputs(dense(foreign, zoo.plain("llama")))).abs().max() <= 1e-6


POWERS = {
    "no JSON": ("{", "cannot be read"),
    "a text": ('{"model.layers.0.self_attn.q_proj": "3"}', "must be a valid integer"),
    "a list": ("[3]", "must be"),
    "another layer": ('{"layers.7.q_proj": 3}', "'layers.7.q_proj'"),
    "too large": ('{"model.layers.0.self_attn.q_proj": 4000}', "less than or equal to 50, got 4000"),
    "deep": ("[" * 100_000, "cannot be read"),
}


@pytest.mark.parametrize("fault", POWERS)
def test_wrong_powers_are_refused_and_nothing_changes(fault, zoo, tmp_path):
    text, message = POWERS[fault]
    zoo.saved(tmp_path / "source", "llama")
    squeeze(tmp_path / "source", tmp_path / "out", dtype=FLOAT8)
    file = tmp_path / "out" / WEIGHTS
    with safe_open(file, "pt") as opened:
        assert json.loads(opened.metadata()["dynrank.powers"])
    save_file(load_file(file), file, metadata={"format": "pt", "dynrank.powers": text})
    zoo.assert_refused(zoo.plain("llama"), tmp_path / "out", re.compile(message, re.DOTALL))


def test_numbers_that_are_not_finite_in_float8_are_refused(zoo, tmp_path):
    zoo.saved(tmp_path / "source", "llama")
    squeeze(tmp_path / "source", tmp_path / "out", dtype=FLOAT8)

    def damage(tensors):
        next(value for key, value in tensors.items() if "lora_A" in key).view(torch.uint8)[0, 0] = 0x7F

    zoo.edit_tensors(tmp_path / "out", damage)
    zoo.assert_refused(zoo.plain("llama"), tmp_path / "out", "holds NaN")


def test_vllm_gets_one_scaling_also_in_float8(zoo, tmp_path):
    source = zoo.saved(tmp_path / "source", "llama", rank_map={"q_proj": {"rank": 2, "alpha": 40}, "v_proj": 1})
    done = dynrank.export_adapter(source, tmp_path / "out", to="vllm", dtype=FLOAT8)
    config = json.loads((tmp_path / "out" / CONFIG).read_text())
    before = stored_updates(source)
    tensors = load_file(tmp_path / "out" / WEIGHTS)
    assert {value.dtype for value in tensors.values()} == {FLOAT8}
    for name, (lora_B, lora_A, scaling) in stored_updates(tmp_path / "out").items():
        # A reader of the global alpha / r finds the same.
        assert scaling == pytest.approx(config["lora_alpha"] / config["r"], rel=1e-12)
        update = before[name][2] * before[name][0] @ before[name][1]
        assert (scaling * lora_B @ lora_A - update).norm() <= 0.06 * update.norm()
        assert done.rounding.layers[name] <= 0.06


REFUSED = {
    "another": ({"dtype": torch.float16}, r"dtype must be one of torch\.float32.*got torch\.float16"),
    "padded": ({"to": "padded", "dtype": FLOAT8}, "with to='padded', got torch.float8_e4m3fn"),
    "llama.cpp": ({"to": "gguf", "dtype": FLOAT8}, "with to='gguf', got torch.float8_e4m3fn"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_dtypes_that_a_reader_lacks_are_refused(case, zoo, tmp_path):
    source = zoo.saved(tmp_path / "source", "llama")
    options, message = REFUSED[case]
    with pytest.raises(ConfigurationError, match=message) as caught:
        dynrank.export_adapter(source, tmp_path / "out", **({"to": "vllm"} | options))
    assert caught.value.arguments == ("dtype",)
    assert not (tmp_path / "out").exists()


def test_commands_say_what_rounding_changed(zoo, launch, tmp_path):
    source = zoo.saved(tmp_path / "source", "llama")
    code, printed, _ = launch("squeeze", source, "--dtype", "float8_e4m3fn", "--rank", 2, "--out", tmp_path / "a")
    assert code == 0
    assert re.search(r"rounding +[345]\.\d\d% of the update, at most [3456]\.\d\d% of a layer's \(model\.", printed)
    assert re.search(r"files .*a, 0\.\d\d MB → 0\.\d\d MB", printed)
    code, printed, _ = launch("export", source, "--to", "padded", "--dtype", "bfloat16", "--out", tmp_path / "b")
    assert code == 0
    assert re.search(r"rounding +0\.[123]\d% of the update", printed)
    code, _, said = launch("squeeze", source, "--dtype", "fp8", "--out", tmp_path / "c")
    assert (code, "float8_e4m3fn, nf4, got 'fp8' (--dtype)" in said) == (2, True)
    assert not (tmp_path / "c").exists()


def test_a_model_of_peft_s_is_saved_in_fewer_bits_as_in_any_other_way(zoo, tmp_path):
    model = zoo.by_peft("bert", tmp_path / "source", use_rslora=True)
    rounding = dynrank.save_adapter(model, tmp_path / "wrapped", dtype=FLOAT8)
    squeeze(tmp_path / "source", tmp_path / "squeezed", dtype=FLOAT8)
    own = dynrank.load_adapter(zoo.plain("bert"), tmp_path / "source")
    assert dynrank.save_adapter(own, tmp_path / "own", dtype=FLOAT8).layers == rounding.layers
    wrapped, squeezed, saved = (load_file(tmp_path / place / WEIGHTS) for place in ("wrapped", "squeezed", "own"))
    assert wrapped.keys() == squeezed.keys() == saved.keys()
    for key, value in wrapped.items():
        assert torch.equal(value.float(), squeezed[key].float())
        assert torch.equal(value.float(), saved[key].float())
    assert {file.name for file in (tmp_path / "wrapped").iterdir()} == {CONFIG, WEIGHTS}
