"""Adapters put into a plain model: what trains then, and what does not fit."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

import dynrank

WEIGHTS = "adapter_model.safetensors"


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "conv"])
def test_load_puts_what_peft_wrote_into_the_model_itself(kind, zoo, tmp_path):
    expected = zoo.outputs(zoo.by_peft(kind, tmp_path))
    model = zoo.plain(kind)
    assert dynrank.load_adapter(model, tmp_path) is model
    assert (zoo.outputs(model) - expected).abs().max() <= 1e-5
    assert {layer.scaling for _, layer in dynrank.lora_layers(model)} == {5 / 3}
    heads = tuple(f"{name}." for name in zoo.heads.get(kind, ()))
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("lora_" in name or name.startswith(heads)), name


def test_load_then_save_writes_the_same(zoo, tmp_path):
    zoo.by_peft("gpt2", tmp_path / "theirs", rank_pattern={"wte": 2})
    dynrank.save_adapter(dynrank.load_adapter(zoo.plain("gpt2"), tmp_path / "theirs"), tmp_path / "ours")
    theirs, ours = (load_file(tmp_path / name / WEIGHTS) for name in ("theirs", "ours"))
    # PEFT also saves the base weights of adapted embeddings.
    factors = {key for key in theirs if "lora_" in key}
    assert set(ours) == factors
    assert all(torch.equal(ours[key], theirs[key]) for key in factors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_is_that_of_the_factors(dtype, zoo, tmp_path):
    zoo.saved(tmp_path, "llama")
    model = dynrank.load_adapter(zoo.plain("llama").bfloat16(), tmp_path, dtype=dtype)
    assert {p.dtype for name, p in model.named_parameters() if "lora_" in name} == {dtype}


def test_an_adapter_in_memory_stays_when_its_file_goes(zoo, tmp_path):
    expected = zoo.outputs(zoo.by_peft("bert", tmp_path))
    adapter = dynrank.read_adapter(tmp_path)
    file = tmp_path / WEIGHTS
    # A careless program might write in place.
    file.write_bytes(bytes(file.stat().st_size))
    assert (zoo.outputs(dynrank.load_adapter(zoo.plain("bert"), adapter)) - expected).abs().max() <= 1e-5


def renamed(tensors):
    for key in [key for key in tensors if "layers.1" in key]:
        tensors[key.replace("layers.1", "layers.7")] = tensors.pop(key)


def of_another_width(tensors):
    key = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"
    tensors[key] = torch.ones(3, 9)


def test_load_refuses_an_adapter_of_another_model_naming_all_faults(zoo, tmp_path):
    zoo.by_peft("llama", tmp_path)
    zoo.edit_tensors(tmp_path, of_another_width)
    zoo.assert_refused(zoo.plain("llama"), tmp_path, r"q_proj' is 8 x 8 in the model and 8 x 9 in the adapter")
    zoo.edit_tensors(tmp_path, renamed)
    zoo.assert_refused(zoo.plain("llama"), tmp_path, r"no module 'model\.layers\.7.*\n.*no module 'model\.layers\.7")


def test_load_refuses_a_head_that_is_not_finite(zoo, tmp_path):
    zoo.by_peft("bert", tmp_path)
    zoo.edit_tensors(tmp_path, lambda tensors: tensors["base_model.model.classifier.weight"].fill_(float("nan")))
    zoo.assert_refused(zoo.plain("bert"), tmp_path, r"classifier.*NaN")


def test_load_refuses_an_adapter_of_a_base_with_other_values(zoo, tmp_path):
    zoo.by_peft("gpt2", tmp_path)
    other = zoo.plain("gpt2")
    with torch.no_grad():
        other.transformer.wte.weight += 1
    assert any("base_layer" in key for key in load_file(tmp_path / WEIGHTS))
    zoo.assert_refused(other, tmp_path, "wte.*another base")


def test_load_refuses_a_copy_of_a_tied_weight(zoo, tmp_path):
    """PEFT trains such a copy apart from the weight it was tied to; one parameter cannot be both."""
    config = LoraConfig(r=2, target_modules=["c_attn"], modules_to_save=["lm_head"])
    get_peft_model(zoo.plain("gpt2"), config).save_pretrained(tmp_path)
    zoo.assert_refused(zoo.plain("gpt2"), tmp_path, "lm_head.weight' is tied")


def test_load_refuses_a_model_with_lora_layers(zoo, tmp_path):
    zoo.assert_refused(zoo.adapted("llama"), zoo.saved(tmp_path, "llama"), "LoRA layers already")
