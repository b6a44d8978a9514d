"""torch.compile: one graph for each rank, and layers that keep the model's names, in PEFT's files too."""

from collections import OrderedDict

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close
from trained import updated
from transformers import LlamaConfig, LlamaForCausalLM

import dynrank
from dynrank.errors import ConfigurationError
from dynrank.layers.frozen_base import without_base

X = torch.randn(5, 16, generator=torch.Generator().manual_seed(3))
TARGETS = ["up", "down"]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def block():
    return nn.Sequential(OrderedDict(up=nn.Linear(16, 24), between=nn.GELU(), down=nn.Linear(24, 16)))


def base():
    torch.manual_seed(0)
    return nn.Sequential(OrderedDict(first=block(), second=block(), head=nn.Linear(16, 12))).eval()


def adapted(seed=1, rank=8, **options):
    model = dynrank.add_lora(base(), **({"rank": rank, "alpha": rank, "target_modules": TARGETS} | options))
    torch.manual_seed(seed)
    return updated(model, 0.1)


def whole(model):
    return torch.compile(model, backend="eager")


def blocks(model):
    """The other usual way: every block by itself."""
    model.first = whole(model.first)
    model.second = whole(model.second)
    return model


def both(model):
    return whole(blocks(model))


def outputs(model):
    with torch.no_grad():
        return model(X)


def test_a_transformers_model_is_one_graph_and_one_more_after_a_change_of_rank():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = dynrank.add_lora(LlamaForCausalLM(LlamaConfig(vocab_size=20, use_cache=False, **sizes)), rank=8, alpha=8)
    updated(model, 0.1)
    counter = CompileCounterWithBackend("eager")
    ids = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
    compiled = torch.compile(model, backend=counter, fullgraph=True)

    def step(forward):
        logits = forward(ids).logits
        return [logits, *torch.autograd.grad(logits.square().mean(), dynrank.adapter_parameters(model))]

    for rank, graphs in ((8, 1), (3, 2)):
        dynrank.resize(model, rank, optimizers=())
        for _ in range(2):
            assert_close(step(compiled), step(model))
        assert counter.frame_count == graphs


def test_every_rank_has_its_own_graph_also_the_ninth():
    """torch keeps 8 versions of a function; after that it would silently run eagerly."""
    layer = dynrank.add_lora(nn.Sequential(nn.Linear(16, 16)), rank=1, alpha=1)[0]
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(layer, backend=counter)
    for rank in range(1, 10):
        dynrank.resize(layer, rank, optimizers=())
        nn.init.normal_(layer.lora_B)
        assert_close(outputs(compiled), layer.base(X) + layer.scaling * X @ layer.lora_A.mT @ layer.lora_B.mT)
        assert counter.frame_count == rank


def test_layers_are_named_resized_and_saved_as_in_the_model_itself(tmp_path):
    options = {"rank_map": {"down": {"rank": 3, "alpha": 5}}, "modules_to_save": ["head"]}
    plain = adapted(**options)
    model = both(adapted(**options))
    assert [name for name, _ in dynrank.lora_layers(model)] == [name for name, _ in dynrank.lora_layers(plain)]
    for one in (plain, model):
        nn.init.ones_(one.head.weight)
        dynrank.resize(one, {"first.up": 1}, optimizers=())
    assert_close(outputs(model), outputs(plain))
    dynrank.save_adapter(model, tmp_path)
    assert_close(outputs(PeftModel.from_pretrained(base(), tmp_path).eval()), outputs(model))
    assert_close(outputs(dynrank.load_adapter(both(base()), tmp_path)), outputs(model))
    assert "OptimizedModule" not in (tmp_path / "adapter_config.json").read_text()


def test_an_adapter_is_added_swapped_and_merged(tmp_path):
    other = adapted(seed=2, rank=3, target_modules=["up", "head"])
    dynrank.save_adapter(other, tmp_path)
    model = dynrank.add_lora(both(base()), rank=2, alpha=2, target_modules=TARGETS)
    assert_close(outputs(model), outputs(base()))
    dynrank.swap_adapter(model, tmp_path)
    assert_close(outputs(model), outputs(other))
    assert_close(outputs(dynrank.merge(model)), outputs(other), rtol=1e-4, atol=1e-5)


def test_layer_that_is_compiled_by_itself_is_refused(tmp_path):
    """Its wrapper calls what it was made of, whatever stands in the place of that."""
    dynrank.save_adapter(adapted(), tmp_path)
    model = base()
    model.first.down = whole(model.first.down)
    with pytest.raises(ConfigurationError, match=r"down.*compile the model afterwards"):
        dynrank.add_lora(model, rank=2, alpha=2, target_modules=TARGETS)
    with pytest.raises(ConfigurationError, match=r"down.*compile the whole model"):
        dynrank.load_adapter(model, tmp_path)
    assert not list(dynrank.lora_layers(model))
    dynrank.add_lora(model, rank=2, alpha=2, target_modules=["up"])
    model.first.up = whole(model.first.up)
    before = outputs(model)
    with pytest.raises(ConfigurationError, match=r"up.*compile the whole model"):
        dynrank.swap_adapter(model, tmp_path)
    assert_close(outputs(model), before)


def test_model_of_peft_keeps_its_config_in_step(tmp_path):
    model = get_peft_model(base(), LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False))
    compiled = whole(model)
    dynrank.resize(compiled, {name: 2 for name, _ in dynrank.lora_layers(model) if "up" in name}, optimizers=())
    model.save_pretrained(tmp_path)
    assert_close(outputs(PeftModel.from_pretrained(base(), tmp_path).eval()), outputs(compiled))


def test_a_state_dict_without_its_base_loads_at_its_ranks():
    model, fresh = (nn.ModuleDict({"net": both(adapted(seed, rank))}) for seed, rank in ((1, 8), (2, 3)))
    state = without_base(model, model.state_dict(), trained=())
    assert not any(name.endswith("base.weight") for name in state)
    fresh.load_state_dict(state)
    assert torch.equal(outputs(fresh["net"]), outputs(model["net"]))
