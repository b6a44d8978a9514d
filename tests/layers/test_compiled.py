"""torch.compile: one graph for each rank, or for all, and layers that keep the model's names, in PEFT's files too."""

import shutil

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


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(16, 24)
        self.down = nn.Linear(24, 16)

    def forward(self, x):
        return x + self.down(nn.functional.gelu(self.up(x)))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(16, 12)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def base():
    torch.manual_seed(0)
    return Net().eval()


def adapted(seed=1, rank=8, **options):
    model = dynrank.add_lora(base(), **({"rank": rank, "target_modules": TARGETS} | options))
    torch.manual_seed(seed)
    return updated(model, 0.1)


def whole(model):
    return torch.compile(model, backend="eager")


def blocks(model):
    """The other usual way: every block by itself."""
    for i, block in enumerate(model.blocks):
        model.blocks[i] = torch.compile(block, backend="eager")
    return model


def both(model):
    return whole(blocks(model))


def outputs(model):
    with torch.no_grad():
        return model(X)


def step(model, forward, x=X):
    """(output, gradient of each factor), with the masks of one seed."""
    torch.manual_seed(5)
    model.zero_grad()
    y = forward(x)
    y.square().mean().backward()
    return [y.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)]


def test_a_transformers_model_is_one_graph_and_one_more_after_a_change_of_rank():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = dynrank.add_lora(LlamaForCausalLM(LlamaConfig(vocab_size=20, use_cache=False, **sizes)), rank=8)
    updated(model, 0.1)
    counter = CompileCounterWithBackend("eager")
    ids = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for rank, graphs in ((8, 1), (3, 2)):
        dynrank.resize(model, rank)
        for _ in range(2):
            got = step(model, lambda ids: compiled(ids).logits, ids)
            assert_close(got, step(model, lambda ids: model(ids).logits, ids))
        assert counter.frame_count == graphs


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor_computes_the_same_as_plain_operations():
    options = {"dropout": 0.3, "backend": "reference", "target_modules": ["blocks.0.up", "blocks.0.down"]}
    plain = adapted(**options).train().blocks[0]
    model = adapted(**options | {"backend": "auto"}).train().blocks[0]
    # inductor has its own generator for seeds; it would start processes, and try what this CPU's vectors can do
    with torch._inductor.config.patch({"fallback_random": True, "compile_threads": 1, "cpp.vec_isa_ok": False}):
        compiled = step(model, torch.compile(model, fullgraph=True))
    assert_close(compiled, step(plain, plain), rtol=1e-4, atol=1e-5)


def test_layers_are_named_and_resized_as_in_the_model_itself():
    plain = adapted()
    model = both(adapted())
    assert [name for name, _ in dynrank.lora_layers(model)] == [name for name, _ in dynrank.lora_layers(plain)]
    for one in (plain, model):
        dynrank.resize(one, {"blocks.0.up": 1})
    assert_close(outputs(model), outputs(plain))


def test_what_is_saved_loads_in_peft(tmp_path):
    model = both(adapted(rank_map={"down": {"rank": 3, "alpha": 5}}, modules_to_save=["head"]))
    with torch.no_grad():
        model.head.weight.mul_(2)
    dynrank.save_adapter(model, tmp_path)
    assert_close(outputs(PeftModel.from_pretrained(base(), tmp_path).eval()), outputs(model))
    assert_close(outputs(dynrank.load_adapter(both(base()), tmp_path)), outputs(model))
    assert "OptimizedModule" not in (tmp_path / "adapter_config.json").read_text()


def test_an_adapter_is_added_swapped_and_merged(tmp_path):
    other = adapted(seed=2, rank=3, target_modules=["up", "head"])
    dynrank.save_adapter(other, tmp_path)
    model = dynrank.add_lora(both(base()), rank=2, target_modules=TARGETS)
    assert_close(outputs(model), outputs(base()))
    dynrank.swap_adapter(model, tmp_path)
    assert_close(outputs(model), outputs(other))
    assert_close(outputs(dynrank.merge(model)), outputs(other), rtol=1e-4, atol=1e-5)


def test_layer_that_is_compiled_by_itself_is_refused(tmp_path):
    """Its wrapper calls what it was made of, whatever stands in the place of that."""
    dynrank.save_adapter(adapted(), tmp_path)
    model = base()
    model.blocks[0].down = whole(model.blocks[0].down)
    with pytest.raises(ConfigurationError, match=r"down.*compile the model afterwards"):
        dynrank.add_lora(model, rank=2, target_modules=TARGETS)
    with pytest.raises(ConfigurationError, match=r"down.*compile the whole model"):
        dynrank.load_adapter(model, tmp_path)
    assert not list(dynrank.lora_layers(model))
    dynrank.add_lora(model, rank=2, target_modules=["up"])
    model.blocks[0].up = whole(model.blocks[0].up)
    before = outputs(model)
    with pytest.raises(ConfigurationError, match=r"up.*compile the whole model"):
        dynrank.swap_adapter(model, tmp_path)
    assert_close(outputs(model), before)


def test_model_of_peft_keeps_its_config_in_step(tmp_path):
    model = get_peft_model(base(), LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False))
    compiled = whole(model)
    dynrank.resize(compiled, {name: 2 for name, _ in dynrank.lora_layers(model) if "up" in name})
    model.save_pretrained(tmp_path)
    assert_close(outputs(PeftModel.from_pretrained(base(), tmp_path).eval()), outputs(compiled))


def test_a_state_dict_without_its_base_loads_at_its_ranks():
    model, fresh = (nn.ModuleDict({"net": both(adapted(seed, rank))}) for seed, rank in ((1, 8), (2, 3)))
    state = without_base(model, model.state_dict(), trained=())
    assert not any(name.endswith("base.weight") for name in state)
    fresh.load_state_dict(state)
    assert torch.equal(outputs(fresh["net"]), outputs(model["net"]))
