"""Putting LoRA layers into whole models, finding them again, loading other ranks into them, and merging them."""

import copy
import json

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import ModelHook, add_hook_to_module
from peft import PeftModel
from torch import nn
from torch.testing import assert_close
from trained import updated
from transformers import GPT2Config, GPT2LMHeadModel, RwkvConfig, RwkvForCausalLM

import dynrank
from dynrank.app.models.pretrained import load_causal_lm
from dynrank.errors import ConfigurationError
from dynrank.layers.kinds import LoRALinear
from dynrank.rank_map import RankBounds

IDS = torch.tensor([[3, 1, 4, 1, 5]])


class Router(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 8))


@pytest.fixture
def net():
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8))
    return nn.ModuleDict({"body": body, "head": nn.Linear(8, 4), "router": Router()})


def test_add_lora_freezes_all_but_adapters_and_modules_to_save_and_works_once(net):
    assert dynrank.add_lora(net, rank=2, target_modules=["0", "1"], modules_to_save=["head"]) is net
    trainable = {name for name, parameter in net.named_parameters() if parameter.requires_grad}
    factors = {f"body.{index}.lora_{factor}" for index in (0, 1) for factor in "AB"}
    assert trainable == factors | {"head.weight", "head.bias"}
    with pytest.raises(ConfigurationError, match="LoRA layers already"):
        dynrank.add_lora(net, rank=2, target_modules=["head"])
    assert [name for name, _ in dynrank.lora_layers(net)] == ["body.0", "body.1"]


@pytest.mark.parametrize(("alpha", "rslora", "scaling"), [(None, False, 2), (9, False, 9 / 6), (9, True, 9 / 6**0.5)])
def test_scaling_starts_at_alpha_over_rank_also_at_a_lower_rank(net, alpha, rslora, scaling):
    dynrank.add_lora(net, rank=6, alpha=alpha, rslora=rslora)
    layers = dict(dynrank.lora_layers(net))
    assert {name: layer.rank for name, layer in layers.items()} == {"body.0": 6, "body.1": 6, "head": 4}
    assert {layer.scaling for layer in layers.values()} == {scaling}


def test_rank_that_is_too_high_for_a_layer_is_lowered_only_beside_a_preset(net, tiny_moe):
    dynrank.add_lora(copy.deepcopy(net), rank=6, target_modules=["all-linear", "head"])
    words = r"'head': rank .* min\(d_in, d_out\) = 4, got 6; lower rank, or set the rank of this layer in rank_map"
    with pytest.raises(ConfigurationError, match=words):
        dynrank.add_lora(net, rank=6, target_modules=["0", "head"])
    moe = dynrank.add_lora(tiny_moe("Qwen3Moe"), rank=8, target_modules=["all-linear", "gate.weight"])
    layers = dict(dynrank.lora_layers(moe))
    assert layers["model.layers.0.mlp.gate.weight"].rank == moe.config.num_experts < 8
    assert layers["model.layers.0.self_attn.q_proj"].rank == 8


def test_a_base_that_accelerate_has_offloaded_is_refused_and_one_that_it_only_moves_is_called(tiny_llama, tmp_path):
    """The device hook doubles the input here, so a layer that leaves it out is seen."""
    dynrank.save_adapter(dynrank.add_lora(load_causal_lm(str(tiny_llama)), rank=2), tmp_path)
    offloaded = cpu_offload(load_causal_lm(str(tiny_llama)), torch.device("cpu"))
    said = r"'model\.layers\.0\.\S*_proj' cannot have LoRA: accelerate keeps its weight elsewhere"
    with pytest.raises(ConfigurationError, match=said):
        dynrank.add_lora(offloaded, rank=2)
    with pytest.raises(ConfigurationError, match=said):
        dynrank.load_adapter(offloaded, tmp_path)
    assert not [*dynrank.lora_layers(offloaded)]

    class Doubling(ModelHook):
        def pre_forward(self, module, x):
            return (2 * x,), {}

    net = nn.Sequential(nn.Linear(4, 4))
    x = torch.randn(3, 4)
    add_hook_to_module(net[0], Doubling())
    expected = net(x)
    assert_close(dynrank.add_lora(net, rank=2)(x), expected)


def test_rwkv_is_refused_as_long_as_it_rescales_weights_in_evaluations():
    size = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 4, "context_length": 16}
    model = RwkvForCausalLM(RwkvConfig(**size, rescale_every=2))
    with pytest.raises(ConfigurationError, match="set rescale_every to 0 in the model's config"):
        dynrank.add_lora(model, rank=2)
    model.config.rescale_every = 0
    updated(dynrank.add_lora(model, rank=2))
    with torch.no_grad():
        trained = model.train()(IDS).logits
        evaluated = model.eval()(IDS).logits
        assert_close(evaluated, trained)
        assert_close(dynrank.merge(model)(IDS).logits, trained, rtol=1e-4, atol=1e-5)


def test_a_layer_in_several_places_is_named_because_peft_adapts_the_first_one_alone(tmp_path):
    def net():
        torch.manual_seed(0)
        return nn.Sequential(*[nn.Linear(4, 4)] * 3)

    with pytest.warns(UserWarning, match="1 of 1 layers, '0' first, stand in several places .* PEFT"):
        model = updated(dynrank.add_lora(net(), rank=2))
    assert [model[i] is model[0] for i in range(3)] == [True] * 3
    dynrank.save_adapter(model, tmp_path)
    x = torch.randn(3, 4)
    with pytest.warns(UserWarning, match="several places"):
        loaded = dynrank.load_adapter(net(), tmp_path)
    assert_close(loaded(x), model(x))
    assert not torch.allclose(PeftModel.from_pretrained(net(), tmp_path)(x), model(x))


@pytest.mark.parametrize("in_a_file", [False, True])
def test_add_lora_rank_map_sets_single_layers(net, tmp_path, in_a_file):
    rules = {"head": {"rank": 4, "alpha": 2, "pinned": True}, r"body\.0": {"rank": 3, "final_rank": 1}}
    if in_a_file:
        (tmp_path / "ranks.yaml").write_text(json.dumps({"rank_pattern": rules}), encoding="utf-8")
        rules = tmp_path / "ranks.yaml"
    dynrank.add_lora(net, rank=2, alpha=4, rank_map=rules)
    layers = dict(dynrank.lora_layers(net))
    assert {name: (layer.rank, layer.scaling) for name, layer in layers.items()} == {
        "body.0": (3, 2.0),
        "body.1": (2, 2.0),
        "head": (4, 0.5),
    }
    assert (layers["head"].bounds, layers["head"].rule) == (RankBounds(pinned=True), "head")
    assert (layers["body.0"].bounds, layers["body.1"].rule) == (RankBounds(final_rank=1), None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank must be greater than or equal to 1, got 0"),
        ({"rank": 5, "target_modules": ["head"]}, r"'head': rank must be .* = 4, got 5"),
        ({"rank_map": {"head": 5}}, r"'head': rank must be .* = 4, got 5"),
        ({"dropout": 1.0}, "dropout must be less than 1, got 1.0"),
        ({"target_modules": ["0", "tail"]}, "'tail'"),
        ({"target_modules": ["body"]}, "cannot have LoRA"),
        ({"modules_to_save": ["tail"]}, "'tail'"),
        ({"modules_to_save": ["head"], "target_modules": ["head"]}, "'head' cannot have LoRA: it is in modules"),
        ({"rank_map": {"tail": 2}}, "'tail' matches no LoRA layer"),
        ({"dtype": torch.int32}, "dtype"),
        ({"dtype": torch.float8_e4m3fn}, "dtype must be .* of at least 16 bits, got torch.float8_e4m3fn"),
        ({"target_modules": ["0", "router.weight"], "dropout": 0.1}, "dropout must be 0 for LoRA in a router, got 0.1"),
        ({"target_modules": [3]}, r"target_modules\[0\] must be a valid string, got 3"),
        ({"backend": "cuda"}, "backend must be 'auto', 'torch', 'triton' or 'reference', got 'cuda'"),
    ],
)
def test_add_lora_failure_changes_nothing(net, options, message):
    modules = list(net.modules())
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ConfigurationError, match=message):
        dynrank.add_lora(net, **({"rank": 2} | options))
    assert [id(module) for module in net.modules()] == [id(module) for module in modules]
    assert all(parameter.requires_grad for parameter in net.parameters())
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


@pytest.mark.parametrize("training", [False, True])
def test_add_lora_keeps_the_mode_and_the_output(net, training):
    net.train(training)
    x = torch.randn(3, 6)
    y = net["head"](net["body"](x))
    dynrank.add_lora(net, rank=2, dropout=0.5)
    assert {module.training for module in net.modules()} == {training}
    assert_close(net["head"](net["body"](x)), y)


class Shared(nn.Module):
    """One layer under three names, two of them in one parent; three times in the computation."""

    def __init__(self):
        super().__init__()
        self.first = self.again = nn.Linear(5, 5)
        self.nested = nn.ModuleList([nn.ReLU(), self.first])

    def forward(self, x):
        return self.nested[1](self.again(self.first(x)))


def test_add_lora_puts_one_layer_everywhere_its_shared_base_stands():
    torch.manual_seed(0)
    model = Shared()
    dynrank.add_lora(model, rank=2, target_modules=["first"])
    assert isinstance(model.first, LoRALinear)
    assert model.nested[1] is model.again is model.first
    assert len(list(dynrank.lora_layers(model))) == 1
    x = torch.randn(3, 5)
    nn.init.normal_(model.first.lora_B)
    y = model(x)
    dynrank.merge(model)
    assert model.nested[1] is model.again is model.first
    assert type(model.first) is nn.Linear
    assert_close(model(x), y)
    with pytest.raises(ConfigurationError, match="no LoRA layers"):
        dynrank.merge(model)


def layer(rank=3):
    torch.manual_seed(0)
    return updated(LoRALinear(nn.Linear(7, 6).requires_grad_(False), rank=rank, scaling=1.5))


@pytest.mark.parametrize("rank", [1, 6])
def test_load_state_dict_takes_the_rank_of_the_checkpoint(rank):
    source = layer(rank)
    target = layer(3)
    x = torch.randn(4, 7)
    original = copy.deepcopy(target)
    target.scaling = 4.0
    ids = [id(target.lora_A), id(target.lora_B)]
    nn.init.zeros_(target.lora_A)
    target(x).sum().backward()
    target.load_state_dict(source.state_dict())
    assert [id(target.lora_A), id(target.lora_B)] == ids
    assert (target.rank, target.alpha) == (rank, 1.5 * rank)
    assert torch.equal(target(x), source(x))
    # The new gradient has another shape than the one that stood there.
    target(x).sum().backward()
    assert torch.equal(original(x), layer(3)(x))


@pytest.mark.parametrize(
    ("lora_A", "lora_B"),
    [((3, 8), (6, 3)), ((3, 7), (5, 3)), ((3, 7), (6, 2)), ((7, 7), (6, 7)), ((0, 7), (6, 0)), ((3, 7, 1), (6, 3))],
)
def test_load_state_dict_names_the_layer_when_the_factors_do_not_fit(lora_A, lora_B):
    net = nn.ModuleDict({"deep": nn.Sequential(layer())})
    before = copy.deepcopy(net.state_dict())
    state = {**before, "deep.0.lora_A": torch.ones(lora_A), "deep.0.lora_B": torch.ones(lora_B)}
    with pytest.raises(ConfigurationError, match=r"factors of 'deep\.0' are"):
        net.load_state_dict(state)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


@pytest.mark.parametrize(("targets", "tied"), [(["lm_head"], False), (["wte"], False), ("all-linear", True)])
def test_merge_keeps_the_logits_and_unties_only_an_adapted_head(targets, tied, tmp_path):
    torch.manual_seed(0)
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=8, n_layer=2, n_head=2, n_positions=16, **ids)).eval()
    model = updated(dynrank.add_lora(gpt2, rank=2, target_modules=targets), 0.3)
    assert model.lm_head.weight is model.transformer.wte.weight
    logits = model(IDS).logits
    assert dynrank.merge(model) is model
    assert_close(model(IDS).logits, logits, rtol=1e-4, atol=1e-5)
    assert (model.lm_head.weight is model.transformer.wte.weight) == model.config.tie_word_embeddings == tied
    model.save_pretrained(tmp_path)
    assert torch.equal(GPT2LMHeadModel.from_pretrained(tmp_path)(IDS).logits, model(IDS).logits)


def test_an_interrupted_merge_counts_no_update_twice(monkeypatch):
    net = updated(dynrank.add_lora(nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4)), rank=2))
    x = torch.randn(3, 6)
    y = net(x)

    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(net[1], "merge", interrupted)
    with pytest.raises(KeyboardInterrupt):
        dynrank.merge(net)
    assert_close(net(x), y)
