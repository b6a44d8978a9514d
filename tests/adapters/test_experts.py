"""Adapters of stacked experts on disk: PEFT computes with our files what we do, and we with its."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.testing import assert_close
from trained import updated

import dynrank
from dynrank.adapters.squeeze import inspect, squeeze
from dynrank.errors import ConfigurationError

KINDS = ("Mixtral", "DeepseekV3", "Qwen3_5Moe", "GptOss")
TENSORS = ["experts.gate_up_proj", "experts.down_proj"]
IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def trained(model):
    """dynrank's layers at ranks that differ from layer to layer.

    Not in DeepSeek's dense and shared layers: PEFT 0.21 takes their names for those of its experts.
    """
    targets = r".*\.(self_attn\.\w+_proj\w*|experts\.\w+_proj)"
    updated(dynrank.add_lora(model, rank=4, alpha=6, dropout=0.1, target_modules=targets), std=0.3)
    dynrank.resize(
        model,
        {name: min(1 + i % 3, layer.rank) for i, (name, layer) in enumerate(dynrank.lora_layers(model))},
        optimizers=(),
    )
    return model


@pytest.mark.parametrize("leaf", ["down_proj_bias", "down_proj"])
def test_what_is_trained_beside_lora_in_experts_is_refused(leaf, tiny_moe, tmp_path):
    """PEFT would leave it out in silence."""
    model = dynrank.add_lora(tiny_moe("GptOss"), rank=2, target_modules=["gate_up_proj"])
    getattr(model.model.layers[1].mlp.experts.base, leaf).requires_grad_(True)
    named = rf"'model\.layers\.1\.mlp\.experts\.{leaf}' and 0 other parameters of layers with LoRA are trained"
    with pytest.raises(ConfigurationError, match=named):
        dynrank.save_adapter(model, tmp_path / "adapter")


def test_layers_that_peft_takes_for_experts_are_named(tiny_moe, tmp_path):
    """Its dense layers have the names that its experts had in transformers 4, and PEFT computes something else."""
    model = updated(
        dynrank.add_lora(tiny_moe("DeepseekV3"), rank=2, target_modules=["gate_proj", "up_proj", "q_b_proj"])
    )
    message = r"DeepseekV3ForCausalLM it takes 4 of 6 layers, 'model.*gate_proj' first, for experts.*target_modules"
    with pytest.warns(UserWarning, match=message):
        dynrank.save_adapter(model, tmp_path)
    theirs = PeftModel.from_pretrained(tiny_moe("DeepseekV3"), tmp_path)
    assert not torch.allclose(logits(theirs), logits(model))
    assert torch.equal(logits(dynrank.load_adapter(tiny_moe("DeepseekV3"), tmp_path)), logits(model))


def ranks(model):
    return {name: layer.rank for name, layer in dynrank.lora_layers(model)}


@pytest.mark.parametrize("kind", KINDS)
def test_peft_computes_with_our_files_what_we_do(kind, tiny_moe, tmp_path):
    model = trained(tiny_moe(kind))
    dynrank.save_adapter(model, tmp_path)
    theirs = PeftModel.from_pretrained(tiny_moe(kind), tmp_path)
    assert_close(logits(theirs), logits(model), rtol=1e-5, atol=1e-5)
    ours = dynrank.load_adapter(tiny_moe(kind), tmp_path)
    assert torch.equal(logits(ours), logits(model))
    assert ranks(ours) == ranks(model)


@pytest.mark.parametrize("targets", [TENSORS, ["down_proj"]])
def test_we_compute_with_pefts_files_what_it_does(targets, tiny_moe, tmp_path):
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj"], target_parameters=targets)
    theirs = updated(get_peft_model(tiny_moe("Qwen3Moe"), config), std=0.3)
    theirs.save_pretrained(tmp_path / "theirs")
    dynrank.save_adapter(theirs, tmp_path / "again")
    for folder in (tmp_path / "theirs", tmp_path / "again"):
        ours = dynrank.load_adapter(tiny_moe("Qwen3Moe"), folder)
        assert_close(logits(ours), logits(theirs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["Mixtral", "DeepseekV3"])
def test_an_adapter_of_pefts_all_linear_with_routers_goes_both_ways(kind, tiny_moe, tmp_path):
    """At rank 6, although a router has four outputs."""
    options = {"task_type": "CAUSAL_LM", "target_modules": "all-linear"}
    theirs = updated(get_peft_model(tiny_moe(kind), LoraConfig(r=6, lora_alpha=9, **options)), std=0.3)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = dynrank.load_adapter(tiny_moe(kind), tmp_path / "theirs")
    names = {name.removeprefix("base_model.model.") for name, _ in dynrank.lora_layers(theirs)}
    assert ranks(ours).keys() == names
    assert any(name.endswith("mlp.gate.weight") for name in names)
    assert_close(logits(ours), logits(theirs), rtol=1e-4, atol=1e-4)
    dynrank.resize(ours, 2, optimizers=())
    dynrank.save_adapter(ours, tmp_path / "ours")
    again = PeftModel.from_pretrained(tiny_moe(kind), tmp_path / "ours")
    assert_close(logits(again), logits(ours), rtol=1e-4, atol=1e-4)
    expected = logits(ours)
    assert_close(logits(dynrank.merge(ours)), expected, rtol=1e-4, atol=1e-4)
    assert ours.state_dict().keys() == tiny_moe(kind).state_dict().keys()


def test_squeezing_a_file_is_resizing_the_model(tiny_moe, tmp_path):
    model = updated(dynrank.add_lora(tiny_moe("GptOss"), rank=4), std=0.3)
    dynrank.save_adapter(model, tmp_path / "full")
    reports = squeeze(tmp_path / "full", tmp_path / "small", rank=2)
    expected = {report.layer: report for report in dynrank.resize(model, 2, optimizers=())}
    small = dynrank.load_adapter(tiny_moe("GptOss"), tmp_path / "small")
    assert_close(logits(small), logits(model), rtol=1e-5, atol=1e-5)
    for report in reports:
        assert report.params_per_rank == expected[report.layer].params_per_rank
        assert_close(report.predicted_error, expected[report.layer].predicted_error)
    for layer, full in zip(inspect(tmp_path / "small"), inspect(tmp_path / "full"), strict=True):
        assert_close(layer.singular_values, full.singular_values[:2], rtol=1e-5, atol=1e-6)


def swapped(tensors):
    """As PEFT wrote before 0.19: A reads what comes out, and B writes what goes in."""
    for name in [name for name in tensors if "experts" in name and "lora_A" in name]:
        other = name.replace("lora_A", "lora_B")
        tensors[name], tensors[other] = tensors[other].mT.contiguous(), tensors[name].mT.contiguous()


def test_a_file_that_does_not_fit_is_refused_by_name(zoo, tiny_moe, tmp_path):
    config = LoraConfig(r=3, target_modules=["q_proj"], target_parameters=["gate_up_proj", "down_proj"])
    get_peft_model(tiny_moe("Qwen3Moe"), config).save_pretrained(tmp_path)
    zoo.edit_tensors(tmp_path, swapped)
    with pytest.raises(ConfigurationError, match=r"experts.down_proj' is 4 x 16 x 12 in the model and"):
        dynrank.load_adapter(tiny_moe("Qwen3Moe"), tmp_path)


def test_servers_that_cannot_read_experts_are_refused_by_name(tiny_moe, tmp_path):
    dynrank.save_adapter(dynrank.add_lora(tiny_moe("Mixtral"), rank=2), tmp_path / "both")
    one = dynrank.add_lora(tiny_moe("Mixtral"), rank=2, target_modules=["q_proj", "experts.down_proj"])
    dynrank.save_adapter(one, tmp_path / "one")
    for adapter, to in (("both", "padded"), ("one", "vllm")):
        with pytest.raises(ConfigurationError, match=r"model\.layers\.0\.mlp\.experts\.down_proj"):
            dynrank.export_adapter(tmp_path / adapter, tmp_path / "out", to=to, model="base")


def test_an_export_for_vllm_has_its_three_dimensional_format_and_one_scaling(tiny_moe, tmp_path):
    """By the sources of vLLM 0.32: ``experts.base_layer`` is gate_up_proj, and only the request says so."""
    model = trained(tiny_moe("Mixtral"))
    dynrank.save_adapter(model, tmp_path / "adapter")
    done = dynrank.export_adapter(tmp_path / "adapter", tmp_path / "out", to="vllm", model="base")
    assert "--enable-mixed-moe-lora-format" in done.line
    assert '"is_3d_lora_weight": true' in done.line
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert not [name for name in settings["target_modules"] if ".experts." in name]
    names = {name.partition(".experts")[2] for name in load_file(tmp_path / "out" / "adapter_model.safetensors")}
    assert names - {""} == {f"{place}.lora_{factor}.weight" for place in ("", ".base_layer") for factor in "AB"}
    theirs = PeftModel.from_pretrained(tiny_moe("Mixtral"), tmp_path / "out")
    assert_close(logits(theirs), logits(model), rtol=1e-5, atol=1e-5)
    assert len({layer.scaling for _, layer in dynrank.lora_layers(theirs)}) == 1
