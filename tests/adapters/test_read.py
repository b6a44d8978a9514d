"""The one reader: what PEFT and dynrank 0.1 wrote is read; a broken or foreign adapter is refused by all."""

import functools
import json
import shutil

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import dynrank
from dynrank.adapters.config import AdapterConfig
from dynrank.adapters.squeeze import inspect, squeeze
from dynrank.app.models.merging import merge_adapter
from dynrank.errors import ConfigurationError, read_as

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
Q = "base_model.model.model.layers.1.self_attn.q_proj"


def config(**changes):
    return lambda zoo, folder: zoo.edit_config(folder, **changes)


def tensors(change):
    return lambda zoo, folder: zoo.edit_tensors(folder, change)


def factor(name, value):
    return tensors(lambda held: held.update({f"{Q}.{name}": value}))


BROKEN = {
    "cut off": (
        lambda _, f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-100]),
        "cannot be read",
    ),
    "foreign": (lambda _, f: save_file({"layers.0.weight": torch.ones(2)}, f / WEIGHTS), "PEFT's.*'layers.0.weight'"),
    "no factors": (lambda _, f: save_file({"base_model.model.x": torch.ones(2)}, f / WEIGHTS), "no LoRA factors"),
    "pickle": (lambda _, f: (f / WEIGHTS).rename(f / "adapter_model.bin"), "pickled adapters"),
    "no JSON": (lambda _, f: (f / CONFIG).write_text("{"), "adapter_config.json' cannot be read"),
    "nested without end": (lambda _, f: (f / CONFIG).write_text("[" * 200_000), "adapter_config.json' cannot be read"),
    "DoRA": (config(use_dora=True), "use_dora must be unset, got True"),
    "bias": (config(bias="all"), "bias must be 'none', got 'all'"),
    "not LoRA": (config(peft_type="LOHA"), "peft_type must be 'LORA', got 'LOHA'"),
    "pissa": (config(init_lora_weights="pissa"), "init_lora_weights must not change the base weight, got 'pissa'"),
    "NaN alpha": (config(lora_alpha=float("nan")), "lora_alpha must"),
    "no expression": (config(alpha_pattern={"(": 2}), r"alpha_pattern has '\(', which is not a regular"),
    "NaN": (factor("lora_A.weight", torch.full((3, 8), float("nan"))), r"layers\.1.*q_proj' holds NaN"),
    "1e300": (factor("lora_A.weight", torch.full((3, 8), 1e300, dtype=torch.float64)), "too large for float32"),
    "half a pair": (tensors(lambda held: held.pop(f"{Q}.lora_A.weight")), "q_proj' lacks one of its two factors"),
    "shape": (factor("lora_B.weight", torch.ones(8, 5)), r"q_proj' must .*\[3, 8\] and \[8, 5\]"),
    "whole numbers": (factor("lora_A.weight", torch.ones(3, 8).int()), "q_proj' must .*got I32"),
    "LoRA bias": (factor("lora_B.bias", torch.ones(8)), "q_proj.lora_B.bias' is a LoRA tensor of an unknown kind"),
    "other rank": (config(r=6), "q_proj' must have the rank of the settings .* 6, got factors of 3"),
}
READERS = {
    "load": lambda model, adapter, out: dynrank.load_adapter(model, adapter),
    "swap": lambda model, adapter, out: dynrank.swap_adapter(model, adapter),
    "squeeze": lambda model, adapter, out: squeeze(adapter, out, rank=1),
    "inspect": lambda model, adapter, out: inspect(adapter),
    "merge": lambda model, adapter, out: merge_adapter(adapter, "./nowhere", out),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_faulty_adapter_is_refused_and_nothing_changes(fault, zoo, tmp_path):
    zoo.by_peft("llama", tmp_path / "adapter")
    break_it, message = BROKEN[fault]
    break_it(zoo, tmp_path / "adapter")
    for name in READERS if fault == "half a pair" else ("load", "squeeze"):
        change = functools.partial(READERS[name], out=tmp_path / "out")
        zoo.assert_refused(zoo.plain("llama"), tmp_path / "adapter", message, change)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_all_faults_of_the_settings_are_named_at_once():
    wrong = {"r": 0, "lora_alpha": "x", "use_qalora": True, "trainable_token_indices": [1]}
    with pytest.raises(ConfigurationError) as caught:
        read_as(AdapterConfig, {"peft_type": "LORA", "new_of_peft": 3} | wrong, "the file")
    assert all(f"\n  {name} must" in str(caught.value) for name in wrong)
    assert "new_of_peft" not in str(caught.value)


PATTERNS = {
    "rslora": {"use_rslora": True},
    # PEFT sorts the keys when it saves, so another order than this sorted one would be lost on disk.
    "overlapping": {
        "rank_pattern": {r"layers\.0.*": 2, r"layers\.1\..*q_proj": 6, "q_proj": 4},
        "alpha_pattern": {r"^model\.layers\.0.*": 1, "down_proj": 3, "q_proj": 7},
    },
    "overlapping-rslora": {"rank_pattern": {".*proj": 2, "v_proj": 4}, "use_rslora": True, "lora_alpha": 3},
    "regex": {"target_modules": r".*\.1\..*_proj"},
    "all-linear": {"target_modules": "all-linear"},
    "as version 0.1 wrote them": {
        "target_modules": ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"],
        "rank_pattern": {r"^model\.layers\.1\.self_attn\.q_proj": 2},
        "alpha_pattern": {r"^model\.layers\.1\.self_attn\.q_proj": 5},
    },
}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_rank_and_scaling_are_those_of_peft(pattern, zoo, tmp_path):
    theirs = zoo.by_peft("llama", tmp_path, **PATTERNS[pattern])
    for name, layer in dynrank.read_adapter(tmp_path).layers.items():
        other = theirs.base_model.model.get_submodule(name)
        assert (layer.rank, layer.scaling) == (other.r["default"], pytest.approx(other.scaling["default"], rel=1e-12))
    model = dynrank.load_adapter(zoo.plain("llama"), tmp_path)
    assert (zoo.outputs(model) - zoo.outputs(theirs)).abs().max() <= 1e-5


# --- damages, by hypothesis: each takes a folder with a whole adapter


def in_bytes(draw, folder):
    file = folder / draw(st.sampled_from([CONFIG, WEIGHTS]))
    content = bytearray(file.read_bytes())
    for _ in range(draw(st.integers(0, 3))):
        # half of them among the first, where a safetensors file has its header
        at = draw(st.integers(0, len(content) - 1) | st.integers(0, min(600, len(content) - 1)))
        content[at] ^= draw(st.integers(1, 255))
    file.write_bytes(content[: draw(st.just(len(content)) | st.integers(0, len(content)))])


VALUES = [None, True, False, 0, -1, 1.5, 1e308, -1e308, 10**400, "", "no", "LORA", "all", "pissa", [], [1], ["lm_head"]]
VALUES += ["(", ["("], {}, {"(": 2}, {"q_proj": "x"}, {"q_proj": 10**400}, {"q_proj": {}}, [[]], {"": 3}, "\ud800"]
VALUES += [float("nan"), float("inf")]


def in_config(draw, folder):
    keys = st.sampled_from([*AdapterConfig.model_fields, "fan_in_fan_out"])
    changes = draw(st.dictionaries(keys, st.sampled_from(VALUES), max_size=2))
    config = json.loads((folder / CONFIG).read_text()) | changes
    (folder / CONFIG).write_text(json.dumps(config if changes else [config]))


@pytest.fixture(scope="module")
def whole(zoo, tmp_path_factory):
    """The folder of an adapter with mixed ranks and a head."""
    options = {"target_modules": ["q_proj", "up_proj", "embed_tokens"], "modules_to_save": ["lm_head"]}
    folder = tmp_path_factory.mktemp("whole") / "adapter"
    return zoo.saved(folder, "llama", rank_map={"up_proj": {"rank": 2, "alpha": 7}}, **options)


@settings(max_examples=50, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_the_whole_is_loaded_with_an_output_or_nothing_changes(whole, zoo, data):
    model = zoo.plain("llama")
    before = zoo.state(model)
    folder = whole.with_name("damaged")
    shutil.copytree(whole, folder, dirs_exist_ok=True)
    data.draw(st.sampled_from([in_bytes, in_config]))(data.draw, folder)
    try:
        dynrank.load_adapter(model, folder)
    except ConfigurationError:
        assert zoo.state(model) == before
    else:
        assert {name for name, _ in dynrank.lora_layers(model)}
        assert zoo.outputs(model).shape == (3, 5, 20)
