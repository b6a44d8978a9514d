"""torch.compile: one graph for each rank, or for all, and layers that keep the model's names, in PEFT's files too."""

import copy
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM

import dynrank
from dynrank.errors import ConfigurationError
from dynrank.layers.frozen_base import without_base

# what torch itself does while it compiles
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]
IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
TARGETS = ["q_proj", "down_proj"]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    with torch._dynamo.config.patch(force_parameter_static_shapes=True):  # torch's default; a capacity changes it
        yield
    torch._dynamo.reset()


def base():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=20, use_cache=False, **sizes)).eval()


def adapted(seed=1, rank=8, **options):
    model = dynrank.add_lora(base(), rank=rank, **options)
    torch.manual_seed(seed)
    for _, layer in dynrank.lora_layers(model):
        nn.init.normal_(layer.lora_B, std=0.1)
    return model


def whole(model):
    return torch.compile(model, backend="eager")


def blocks(model):
    """The other usual way: every block by itself."""
    for i, block in enumerate(model.model.layers):
        model.model.layers[i] = torch.compile(block, backend="eager")
    return model


def both(model):
    return whole(blocks(model))


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def step(forward, model):
    """(loss, gradient of each factor), with the masks of one seed."""
    torch.manual_seed(5)
    model.zero_grad()
    loss = forward(input_ids=IDS, labels=IDS).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)]


def test_one_graph_and_one_more_after_a_change_of_rank():
    model = adapted().train()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for rank, graphs in ((8, 1), (3, 2)):
        dynrank.resize(model, rank)
        for _ in range(2):
            assert_close(step(compiled, model), step(model, model))
        assert counter.frame_count == graphs


def test_with_a_capacity_one_graph_serves_every_rank():
    model = copy.deepcopy(adapted(dropout=0.3, capacity=16, group=False)).train()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    up = "model.layers.0.mlp.up_proj"
    for ranks in (8, 6, {up: 2}, 16, {up: 7}, 3):
        dynrank.resize(model, ranks, optimizers=[optimizer])
        assert_close(step(compiled, model), step(model, model))
        optimizer.step()
    assert counter.frame_count == 1
    dynrank.resize(model, 1)
    assert_close(step(compiled, model), step(model, model))
    assert counter.frame_count == 2  # torch compiles for sizes of 1 by themselves


def test_capacity_bounds_the_rank_of_a_copy_too():
    with pytest.raises(ConfigurationError, match=r"capacity must be at least the rank, 8, got 7; set lora.capacity"):
        adapted(capacity=7)
    with pytest.raises(ConfigurationError, match=r"between 1 and lora.capacity = 12, got 13"):
        dynrank.resize(copy.deepcopy(adapted(capacity=12)), 13)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated:DeprecationWarning")  # torch, within inductor
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor_computes_the_same():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16))
    dynrank.add_lora(model, rank=8, dropout=0.3, target_modules=["0", "2"])
    for _, layer in dynrank.lora_layers(model):
        nn.init.normal_(layer.lora_B, std=0.1)
    x, results = torch.randn(10, 16), []
    for function in (model, torch.compile(model, fullgraph=True)):
        torch.manual_seed(5)
        model.zero_grad()
        with torch._inductor.config.patch(fallback_random=True):  # inductor has a generator of its own for the seeds
            y = function(x)
        y.square().sum().backward()
        results.append([y.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)])
    assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("wrap", [whole, blocks])
def test_layers_are_named_and_resized_as_in_the_model_itself(wrap):
    plain, model = adapted(), wrap(adapted())
    assert [name for name, _ in dynrank.lora_layers(model)] == [name for name, _ in dynrank.lora_layers(plain)]
    for one in (plain, model):
        dynrank.resize(one, {"model.layers.0.self_attn.q_proj": 1})
    assert_close(logits(model), logits(plain))


def test_what_is_saved_loads_in_peft(tmp_path):
    options = {"rank_map": {"down_proj": {"rank": 3, "alpha": 5}}, "modules_to_save": ["lm_head"]}
    model = both(adapted(target_modules=TARGETS, **options))
    with torch.no_grad():
        next(parameter for name, parameter in model.named_parameters() if "lm_head" in name).mul_(2)
    dynrank.save_adapter(model, tmp_path)
    assert_close(logits(PeftModel.from_pretrained(base(), tmp_path).eval()), logits(model))
    assert_close(logits(dynrank.load_adapter(both(base()), tmp_path)), logits(model))
    assert "OptimizedModule" not in (tmp_path / "adapter_config.json").read_text()


def test_an_adapter_is_added_swapped_and_merged(tmp_path):
    other = adapted(seed=2, rank=3, target_modules=["q_proj", "k_proj"])
    dynrank.save_adapter(other, tmp_path)
    model = dynrank.add_lora(both(base()), rank=2, target_modules=TARGETS)
    assert_close(logits(model), logits(base()))
    dynrank.swap_adapter(model, tmp_path)
    assert_close(logits(model), logits(other))
    assert_close(logits(dynrank.merge(model)), logits(other), rtol=1e-4, atol=1e-5)


def test_layer_that_is_compiled_by_itself_is_refused(tmp_path):
    """Its wrapper calls what it was made of, whatever stands in the place of that."""
    dynrank.save_adapter(adapted(target_modules=TARGETS), tmp_path)
    model = base()
    model.model.layers[0].mlp.down_proj = torch.compile(model.model.layers[0].mlp.down_proj, backend="eager")
    with pytest.raises(ConfigurationError, match=r"down_proj.*compile the model afterwards"):
        dynrank.add_lora(model, rank=2, target_modules=TARGETS)
    with pytest.raises(ConfigurationError, match=r"down_proj.*compile the whole model"):
        dynrank.load_adapter(model, tmp_path)
    assert not list(dynrank.lora_layers(model))
    dynrank.add_lora(model, rank=2, target_modules=["q_proj"])
    model.model.layers[0].self_attn.q_proj = torch.compile(model.model.layers[0].self_attn.q_proj, backend="eager")
    before = logits(model)
    with pytest.raises(ConfigurationError, match=r"q_proj.*compile the whole model"):
        dynrank.swap_adapter(model, tmp_path)
    assert_close(logits(model), before)


def test_model_of_peft_keeps_its_config_in_step(tmp_path):
    model = get_peft_model(base(), LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False))
    compiled = whole(model)
    dynrank.resize(compiled, {name: 2 for name, _ in dynrank.lora_layers(model) if "q_proj" in name})
    model.save_pretrained(tmp_path)
    assert_close(logits(PeftModel.from_pretrained(base(), tmp_path).eval()), logits(compiled))


@pytest.mark.parametrize("wrap", [whole, blocks])
def test_a_state_dict_without_its_base_loads_at_its_ranks(wrap):
    model, fresh = (nn.ModuleDict({"net": wrap(adapted(seed, rank))}) for seed, rank in ((1, 8), (2, 3)))
    state = without_base(model, model.state_dict(), trained=())
    assert not any(name.endswith("base.weight") for name in state)
    fresh.load_state_dict(state)
    assert torch.equal(logits(fresh["net"]), logits(model["net"]))
