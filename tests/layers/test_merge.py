"""dynrank.merge: equal to the adapted model in float64 and to PEFT's merge, and rounded once."""

import copy

import pytest
import torch
from peft import PeftModel
from torch.testing import assert_close

import dynrank
from dynrank.layers.kinds import layer_class

ROUNDING = {"rtol": 1e-12, "atol": 1e-12}


def everything(model, tied=True):
    left_out = ("token_type_embeddings", *(() if tied else ("lm_head", "wte")))
    return [n for n, m in model.named_modules() if layer_class(m) and not n.endswith(left_out)]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "conv"])
def test_merge_equals_the_adapted_model_and_the_merge_of_peft_in_float64(kind, zoo, tmp_path):
    base = zoo.plain(kind).double()
    options = {"rslora": True, "modules_to_save": (), "dtype": torch.float64}
    model = zoo.adapted(kind, base=copy.deepcopy(base), target_modules=everything(base), **options)
    expected = zoo.outputs(model)
    assert_close(zoo.outputs(dynrank.merge(model)), expected, **ROUNDING)
    assert (expected - zoo.outputs(base)).abs().max() > 1e-2
    assert {p.dtype for p in model.parameters()} == {torch.float64}

    # PEFT's merge changes both ends of a tied weight
    model = zoo.adapted(kind, base=copy.deepcopy(base), target_modules=everything(base, tied=False), **options)
    dynrank.save_adapter(model, tmp_path)
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, autocast_adapter_dtype=False)
    theirs = theirs.double().merge_and_unload().state_dict()
    ours = dynrank.merge(model).state_dict()
    assert set(ours) == set(theirs)
    for name, value in ours.items():
        assert_close(value, theirs[name], **ROUNDING)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_merge_keeps_the_dtype_and_rounds_once(dtype, zoo):
    base = zoo.plain("llama").to(dtype)
    model = zoo.adapted("llama", base=copy.deepcopy(base))
    layers = dict(dynrank.lora_layers(model))
    updates = {name: layer.scaling * layer.lora_B.double() @ layer.lora_A.double() for name, layer in layers.items()}
    dynrank.merge(model)
    for name, update in updates.items():
        exact = base.get_submodule(name).weight.double() + update
        found = model.get_submodule(name).weight
        assert found.dtype == dtype
        half_step = torch.finfo(dtype).eps / 2 * exact.abs() + torch.finfo(dtype).tiny
        # the sum is made in float32, with a few of its roundings
        assert ((found.double() - exact).abs() <= half_step + 4e-7 * exact.abs().max()).all()
