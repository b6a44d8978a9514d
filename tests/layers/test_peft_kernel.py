"""The fused op in PEFT's layers computes what PEFT computes, and PEFT computes wherever the op would not."""

import contextlib
import copy
import csv
import io
import math
import pickle
from collections import Counter, OrderedDict
from pathlib import Path

import bitsandbytes
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.helpers import disable_input_dtype_casting
from peft.tuners import lora
from safetensors.torch import load_file
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrize
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts
from transformers.pytorch_utils import Conv1D

import dynrank
from dynrank.errors import ConfigurationError
from dynrank.kernels import backends
from dynrank.layers import peft_op, peft_op_4bit

OP = {"lora_linear": 2}
PLAIN = {"add_update": 2}
EACH = {"lora_linear": 1, "add_update": 1}
X = torch.randn(2, 7, 12, generator=torch.Generator().manual_seed(1))
STACKS = {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"], "r": 3}
BF16 = torch.bfloat16


@pytest.fixture
def calls(monkeypatch):
    """How often each function that computes for PEFT was called; what pays does so whatever the size."""
    made = Counter()

    def count(name, function):
        return lambda *args: (made.update([name]), function(*args))[1]

    functions = [(peft_op, "lora_linear"), (peft_op, "add_update"), (peft_op, "experts_forward")]
    for module, name in [*functions, (peft_op_4bit, "lora_linear")]:
        monkeypatch.setattr(module, name, count(name, getattr(module, name)))
    for module, name in (
        (peft_op, "may_pay"),
        (peft_op, "op_pays"),
        (peft_op_4bit, "op_pays"),
        (peft_op, "experts_pay"),
    ):
        monkeypatch.setattr(module, name, lambda *args: True)
    return made


@pytest.fixture(params=["lora_linear", "add_update"])
def way(request, calls, monkeypatch):
    """The function that computes: the op, or plain operations as where the op does not pay."""
    monkeypatch.setattr(peft_op, "op_pays", lambda *args: request.param == "lora_linear")
    return request.param


def net(kind=nn.Linear):
    torch.manual_seed(0)
    first = Conv1D(20, 12) if kind is Conv1D else kind(12, 20)
    return nn.Sequential(first, nn.Tanh(), nn.Linear(20, 3))


def wrapped(base=None, *, dtype=torch.float32, narrow=False, **options):
    options = {"r": 5, "lora_alpha": 7, "target_modules": ["0", "2"], "init_lora_weights": False} | options
    base = net() if base is None else base
    return get_peft_model(base.to(dtype), LoraConfig(**options), autocast_adapter_dtype=not narrow).train()


def layers(model):
    return [module for module in model.modules() if isinstance(module, lora.LoraLayer)]


def trained(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def outcome(model, x=X, autocast=False, **options):
    """The output and all gradients; one that is not there is empty."""
    torch.manual_seed(2)
    x = x.clone().requires_grad_()
    model.zero_grad()
    with torch.autocast("cpu", BF16) if autocast else contextlib.nullcontext():
        y = model(x, **options)
    y.float().square().sum().backward()
    return [y.detach(), *(torch.empty(0) if each.grad is None else each.grad for each in (x, *trained(model)))]


def assert_near(got, expected, tolerance):
    """Within a part of each tensor's norm."""
    for one, other in zip(got, expected, strict=True):
        assert (one.double() - other.double()).norm() <= tolerance * other.double().norm()


# {case: (first layer, options of the model, those of the call)}
CASES = {
    "float32": (nn.Linear, {}, {}),
    "float64": (nn.Linear, {"dtype": torch.float64}, {}),
    "ranks": (nn.Linear, {"rank_pattern": {"0": 3}, "use_rslora": True}, {}),
    "rows": (nn.Linear, {}, {"x": X[0]}),
    "one row": (nn.Linear, {}, {"x": X[0, 0]}),
    "Conv1D": (Conv1D, {"fan_in_fan_out": True}, {}),
    "bfloat16, factors in float32": (nn.Linear, {"dtype": BF16}, {}),
    "bfloat16": (nn.Linear, {"dtype": BF16, "narrow": True}, {}),
    "bfloat16, autocast": (nn.Linear, {"dtype": BF16}, {"autocast": True}),
    "float32, autocast": (nn.Linear, {}, {"autocast": True}),
    "bfloat16, Conv1D": (Conv1D, {"fan_in_fan_out": True, "dtype": BF16}, {}),
}


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to (True|False):UserWarning")
@pytest.mark.parametrize("name", CASES)
def test_output_and_gradients_are_those_of_peft_in_float64(name, way, calls):
    base, options, call = CASES[name]
    theirs = wrapped(net(base), **options)
    ours = dynrank.apply_lora_kernel(copy.deepcopy(theirs))
    call = {**call, "x": call.get("x", X).to(options.get("dtype", torch.float32))}
    got = outcome(ours, **call)
    assert calls == {way: 2}
    assert [tensor.dtype for tensor in got] == [tensor.dtype for tensor in outcome(theirs, **call)]
    wide = outcome(theirs.double(), call["x"].double())
    assert_near(got, wide, 3e-2 if "bfloat16" in name or "autocast" in name else 1e-5)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Halved(nn.Module):
    def forward(self, weight):
        return weight / 2


def parametrized():
    base = nn.Sequential(OrderedDict(zip("abc", net(), strict=True)))
    parametrize.register_parametrization(base.a, "weight", Halved())
    return base


def double_forward(module):
    forward = module.forward
    module.forward = lambda *args: 2 * forward(*args)


def add_second(model):
    old = model.peft_config["default"]
    where = {"target_modules": old.target_modules, "target_parameters": old.target_parameters}
    model.add_adapter("second", LoraConfig(r=2, init_lora_weights=False, **where))


# What is done to a model with the kernel, and whether the op computes then.
CHANGES = {
    "an adapter that waits": (add_second, True),
    "another adapter": (lambda model: (add_second(model), model.set_adapter("second")), True),
    "two adapters": (lambda model: (add_second(model), model.base_model.set_adapter(["default", "second"])), False),
    "a deleted adapter": (lambda model: (add_second(model), model.delete_adapter("second")), True),
    "merged": (lambda model: model.merge_adapter(), False),
    "unmerged": (lambda model: (model.merge_adapter(), model.unmerge_adapter()), True),
    "disabled": (lambda model: model.base_model.disable_adapter_layers(), False),
    "another scale": (lambda model: [layer.set_scale("default", 5) for layer in layers(model)], True),
    "frozen factors": (lambda model: [layer.lora_A.requires_grad_(False) for layer in layers(model)], True),
}
# {case: (the base, options of LoRA, what is done to the model with the kernel, what computes then)}
DECIDED = {name: (net, {}, change, OP if by_op else {}) for name, (change, by_op) in CHANGES.items()} | {
    "DoRA": (net, {"use_dora": True}, id, {}),
    "a bias in B": (net, {"lora_bias": True}, id, {}),
    "trained biases": (net, {"bias": "lora_only"}, id, PLAIN),
    "a trained base": (net, {}, lambda model: layers(model)[0].base_layer.weight.requires_grad_(), EACH),
    "a trained head": (net, {"target_modules": ["0"], "modules_to_save": ["2"]}, id, {"lora_linear": 1}),
    "a base of a subclass": (lambda: net(Doubled), {}, id, EACH),
    "a parametrized base": (parametrized, {"target_modules": ["a", "c"]}, id, EACH),
}
PARTS = ("base_layer", "lora_A.default", "lora_B.default", "lora_dropout.default")
DECIDED |= {
    f"a forward of its own in {part}": (
        net,
        {},
        lambda model, part=part: double_forward(layers(model)[0].get_submodule(part)),
        EACH,
    )
    for part in PARTS
}


@pytest.mark.filterwarnings("ignore:Adapter default was active which is now deleted:UserWarning")
@pytest.mark.parametrize("name", DECIDED)
def test_each_call_decides_who_computes_and_comes_to_what_peft_does(name, calls):
    base, options, change, expected = DECIDED[name]
    theirs, ours = wrapped(base(), **options), dynrank.apply_lora_kernel(wrapped(base(), **options))
    ours.load_state_dict(theirs.state_dict())
    for model in (theirs, ours):
        torch.manual_seed(3)
        change(model)
    assert_near(outcome(ours), outcome(theirs), 1e-5)
    assert calls == expected


def test_mixed_batch_of_adapters_is_pefts(calls):
    theirs = wrapped()
    add_second(theirs)
    ours = dynrank.apply_lora_kernel(copy.deepcopy(theirs)).eval()
    theirs.eval()
    names = {"adapter_names": ["second", "__base__"]}
    assert_close(outcome(ours, **names), outcome(theirs, **names))
    assert calls == {}
    outcome(ours)
    assert calls == OP


def test_input_that_peft_is_told_not_to_cast_is_an_error_as_in_peft(calls):
    model = dynrank.apply_lora_kernel(wrapped(dtype=BF16))
    with disable_input_dtype_casting(model), pytest.raises(RuntimeError, match="same dtype"):
        model(X.bfloat16())
    with pytest.raises(RuntimeError, match="same dtype"):
        model(X)
    assert calls == {}


@pytest.mark.parametrize("kind", ["forward_pre", "forward", "full_backward_pre", "full_backward"])
@pytest.mark.parametrize("part", PARTS)
def test_hooks_on_the_parts_of_a_layer_are_called_and_change_what_they_change_in_peft(part, kind, calls):
    theirs = wrapped()
    ours = dynrank.apply_lora_kernel(copy.deepcopy(theirs))
    unhooked = outcome(theirs)
    heard = Counter()
    for model in (theirs, ours):

        def hook(module, *values, model=model):
            heard[model] += 1
            return 2 * values[-1] if kind == "forward" else tuple(2 * value for value in values[0])

        getattr(layers(model)[0].get_submodule(part), f"register_{kind}_hook")(hook)
    expected = outcome(theirs)
    assert_close(outcome(ours), expected)
    assert heard[ours] == heard[theirs] > 0
    assert not all(torch.equal(one, other) for one, other in zip(expected, unhooked, strict=True))
    # The other layer has no hooks.
    assert calls["lora_linear"] == calls["add_update"]


def test_hooks_of_all_modules_are_called_and_change_what_they_change_in_peft(calls):
    heard = Counter()
    outcomes = []
    for change in (lambda model: model, dynrank.apply_lora_kernel):
        model = change(wrapped())
        hook = nn.modules.module.register_module_forward_hook(
            lambda module, x, y, model=model: (heard.update([model]), y / 2 if type(module) is nn.Linear else y)[1]
        )
        outcomes.append(outcome(model))
        hook.remove()
    assert_close(*outcomes)
    assert [*heard.values()] == [max(heard.values())] * 2
    assert calls == PLAIN


def test_a_base_that_computes_its_weight_computes_it_as_often_as_in_peft(calls):
    theirs = wrapped(parametrized(), target_modules=["a", "c"])
    counts = []
    for model in (theirs, dynrank.apply_lora_kernel(copy.deepcopy(theirs))):
        made = Counter()
        halve = layers(model)[0].base_layer.parametrizations.weight[0]
        halve.register_forward_hook(lambda *_, made=made: made.update("w"))
        model(X)
        counts.append(made["w"])
    assert counts == [1, 1]


def test_gradients_in_batches_are_pefts_and_refused_by_torch_with_dropout(calls):
    """The backward draws dropout's mask again, which torch forbids there."""
    theirs = wrapped()
    x = X.clone().requires_grad_()
    found = []
    for model in (theirs, dynrank.apply_lora_kernel(copy.deepcopy(theirs))):
        y = model(x)
        found.append(torch.autograd.grad(y, x, torch.stack([torch.ones_like(y), y]), is_grads_batched=True))
    assert_close(*found)
    y = dynrank.apply_lora_kernel(wrapped(lora_dropout=0.5))(x)
    with pytest.raises(RuntimeError, match="random operations"):
        torch.autograd.grad(y, x, torch.stack([torch.ones_like(y)] * 2), is_grads_batched=True)


def test_factors_of_two_dtypes_train_under_autocast_as_in_peft(way, calls):
    theirs = wrapped()
    for layer in layers(theirs):
        layer.lora_A.bfloat16()
    ours = dynrank.apply_lora_kernel(copy.deepcopy(theirs))
    assert_near(outcome(ours, autocast=True), outcome(theirs, autocast=True), 3e-2)
    assert calls == {way: 2}


def test_dropout_scales_what_it_keeps_and_backward_drops_what_forward_did(way, calls):
    """With factors of ones on the diagonal the update of ones is the mask itself, and so is the gradient of x."""
    p, size = 0.25, 64
    model = wrapped(nn.Sequential(nn.Linear(size, size)), r=size, lora_alpha=size, target_modules=["0"], lora_dropout=p)
    layer = layers(dynrank.apply_lora_kernel(model))[0]
    for part in (layer.base_layer, layer.lora_A["default"], layer.lora_B["default"]):
        nn.init.eye_(part.weight)
    nn.init.zeros_(layer.base_layer.bias)
    x = torch.ones(200, size, requires_grad=True)
    torch.manual_seed(0)
    y = model(x)
    y.sum().backward()
    mask = y.detach() - 1
    assert_close(mask.unique(), torch.tensor([0.0, 1 / (1 - p)]))
    # Five standard deviations of a mean.
    assert abs(mask.mean() - 1) < 5 * math.sqrt(p / (1 - p) / mask.numel())
    assert_close(x.grad, y.detach())
    for factor in trained(model):
        assert_close(factor.grad, mask.sum(0).expand(size, size), rtol=1e-5, atol=0)
    assert not torch.equal(model(x), y)
    torch.manual_seed(0)
    assert torch.equal(model(x), y)
    torch.manual_seed(0)
    if way == "add_update":
        assert torch.equal(dynrank.remove_lora_kernel(copy.deepcopy(model))(x), y)
    assert torch.equal(model.eval()(x), 2 * torch.ones_like(x))
    assert calls == {way: 4}


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_of_activations_gives_the_same_gradients(use_reentrant, way, calls):
    model = dynrank.apply_lora_kernel(wrapped(lora_dropout=0.4))

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inside = model

        def forward(self, x):
            return checkpoint(self.inside, x, use_reentrant=use_reentrant)

    assert_close(outcome(Checkpointed()), outcome(model), rtol=0, atol=0)
    # Twice in the checkpointed pass, and once in the other; torch ends the second time before the last sum.
    early = way == "add_update" and not use_reentrant
    assert calls == {way: 5 if early else 6}


def penalty(model):
    """All gradients of the sum of the squares of all gradients."""
    leaves = [X.clone().requires_grad_(), *trained(model)]
    slopes = torch.autograd.grad(model(leaves[0]).square().sum(), leaves, create_graph=True)
    return torch.autograd.grad(sum(slope.square().sum() for slope in slopes), leaves)


def input_gradients(model):
    def loss(x):
        return model(x).square().sum()

    return torch.func.vmap(torch.func.grad(loss))(X[0])


def forward_mode(model):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(model(forward_ad.make_dual(X, torch.ones_like(X)))).tangent


def compiled(model):
    return outcome(torch.compile(model, fullgraph=True, backend="aot_eager"))


def traced(model):
    return torch.jit.trace(model.base_model.model, X, check_trace=False)(2 * X)


def exported(model):
    return torch.export.export(model.base_model.model, (X,)).module()(2 * X)


@pytest.mark.filterwarnings("ignore:`torch.jit.trace.*:DeprecationWarning")
@pytest.mark.parametrize(
    ("read", "expected"),
    [
        (penalty, {"lora_linear": 2}),
        (compiled, {}),
        (input_gradients, {}),
        (traced, {}),
        (exported, {}),
        (forward_mode, {}),
    ],
)
def test_second_derivatives_transforms_and_compilers_find_what_they_find_in_peft(read, expected, calls):
    theirs = wrapped()
    ours = dynrank.apply_lora_kernel(copy.deepcopy(theirs))
    assert_close(read(ours), read(theirs), rtol=1e-4, atol=1e-4)
    assert calls == expected


def test_copies_pickles_and_files_are_pefts_and_compute_by_the_op(calls, tmp_path):
    theirs = wrapped(modules_to_save=["1"])
    ours = dynrank.apply_lora_kernel(copy.deepcopy(theirs))
    classes = [type(module) for module in ours.modules()]
    assert dynrank.apply_lora_kernel(ours) is ours
    assert [type(module) for module in ours.modules()] == classes
    assert classes != [type(module) for module in theirs.modules()]
    assert repr(ours) == repr(theirs)
    expected = outcome(theirs)
    stored = io.BytesIO()
    torch.save(ours, stored)
    stored.seek(0)
    loaded = torch.load(stored, weights_only=False)
    for each in (ours, copy.deepcopy(ours), copy.copy(ours), pickle.loads(pickle.dumps(ours)), loaded):
        calls.clear()
        assert [type(module) for module in each.modules()] == classes
        assert_close(outcome(each), expected)
        assert calls == OP
    for model, name in ((ours, "ours"), (theirs, "theirs")):
        model.save_pretrained(tmp_path / name)
    assert_close(ours.state_dict(), theirs.state_dict(), rtol=0, atol=0)
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "theirs"))
    assert_close(one, other, rtol=0, atol=0)
    again = dynrank.apply_lora_kernel(PeftModel.from_pretrained(net(), tmp_path / "ours", is_trainable=True))
    calls.clear()
    assert_close(outcome(again), expected)
    assert calls == OP
    assert_close(copy.deepcopy(ours).merge_and_unload()(X), expected[0])
    assert dynrank.remove_lora_kernel(ours) is ours
    assert [type(module) for module in ours.modules()] == [type(module) for module in theirs.modules()]


def test_a_cut_of_ranks_and_steps_with_optimizer_state_end_as_in_peft(calls):
    theirs = wrapped()
    ours = dynrank.apply_lora_kernel(copy.deepcopy(theirs))
    for model in (theirs, ours):
        optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
        for _ in range(3):
            outcome(model)
            optimizer.step()
            dynrank.resize(model, {"base_model.model.0": 2, "base_model.model.2": 3}, optimizers=[optimizer])
    assert [layer.r["default"] for layer in layers(ours)] == [2, 3]
    assert_close(outcome(ours), outcome(theirs), rtol=1e-4, atol=1e-5)
    assert calls == {"lora_linear": 8}


def test_layers_of_other_kinds_stay_pefts():
    modules = {"words": nn.Embedding(9, 16), "image": nn.Conv2d(3, 4, 1), "bytes": bitsandbytes.nn.Linear8bitLt(16, 16)}
    base = nn.ModuleDict(modules | {"other": nn.Linear(16, 16), "plain": nn.Linear(16, 16)})
    base.is_loaded_in_8bit = True
    model = get_peft_model(base, LoraConfig(r=2, target_modules=[*base]))
    # As fully_shard does.
    layers(model)[-2].__class__ = other = type("Other", (lora.layer.Linear,), {})
    kinds = [type(layer) for layer in layers(dynrank.apply_lora_kernel(model))]
    assert kinds == [lora.layer.Embedding, lora.layer.Conv2d, lora.bnb.Linear8bitLt, other, peft_op.Linear]


@pytest.mark.parametrize("model", [net(), dynrank.add_lora(net(), rank=2, target_modules=["0"])])
def test_a_model_without_layers_of_peft_is_refused(model):
    with pytest.raises(ConfigurationError, match="apply_lora_kernel .*is for LoRA layers of PEFT"):
        dynrank.apply_lora_kernel(model)


@pytest.mark.parametrize(
    ("options", "autocast"), [({}, False), ({"bias": "lora_only"}, False), ({"use_dora": True}, False), ({}, True)]
)
def test_layers_in_4_bits_train_by_the_op_and_generate_by_bitsandbytes(options, autocast, calls, monkeypatch):
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
    torch.manual_seed(0)
    options = {"target_modules": ["0"], **options}
    base = nn.Sequential(bitsandbytes.nn.Linear4bit(64, 32, quant_type="nf4", compute_dtype=torch.float32)).to("cpu")
    base.is_loaded_in_4bit = True
    theirs = wrapped(base, **options)
    ours = dynrank.apply_lora_kernel(copy.deepcopy(theirs))
    assert type(layers(ours)[0]) is peft_op_4bit.Linear4bit
    x = torch.randn(2, 3, 64)
    got, expected = outcome(ours, x, autocast=autocast), outcome(theirs, x, autocast=autocast)
    assert [tensor.dtype for tensor in got] == [tensor.dtype for tensor in expected]
    assert_near(got, expected, 3e-2 if autocast else 1e-5)
    assert calls == ({} if len(options) > 1 else {"lora_linear": 1})
    calls.clear()
    with torch.no_grad():
        assert torch.equal(ours(x), theirs(x))
    hooks = [layers(model)[0].base_layer.register_forward_hook(lambda m, x, y: 2 * y) for model in (ours, theirs)]
    assert_close(outcome(ours, x, autocast), outcome(theirs, x, autocast), rtol=0, atol=0)
    for hook in hooks:
        hook.remove()
    with disable_input_dtype_casting(ours), pytest.raises(RuntimeError, match="same dtype"):
        ours(x.bfloat16())
    monkeypatch.setattr(peft_op_4bit, "op_pays", lambda *args: False)
    assert_close(outcome(ours, x, autocast), outcome(theirs, x, autocast), rtol=0, atol=0)
    assert calls == {}


class Experts(nn.Module):
    """Four experts, two of them for each row, whose choice stays."""

    def __init__(self, kind):
        super().__init__()
        size = {"hidden_size": 16, "moe_intermediate_size": 24, "num_experts": 4}
        self.experts = Qwen3MoeExperts(Qwen3MoeConfig(**size, experts_implementation=kind))
        for weight in self.experts.parameters():
            nn.init.normal_(weight, std=0.3)

    def forward(self, x):
        chosen = torch.rand(len(x), 4, generator=torch.Generator().manual_seed(0)).topk(2)
        return self.experts(x, chosen.indices, chosen.values.to(x.dtype))


def expert_models(kind="eager", dtype=torch.float32, **options):
    """(PEFT's model, the same with the kernel)."""
    torch.manual_seed(0)
    theirs = wrapped(Experts(kind), dtype=dtype, **(STACKS | options))
    return theirs, dynrank.apply_lora_kernel(copy.deepcopy(theirs))


def rows(count=9):
    return torch.randn(count, 16, generator=torch.Generator().manual_seed(1))


def test_no_tokens_and_a_forward_of_the_experts_own_give_what_peft_gives(calls):
    theirs, ours = expert_models()
    assert ours(rows(0)).shape == theirs(rows(0)).shape == (0, 16)
    assert calls == {"experts_forward": 1}
    for model in (theirs, ours):
        double_forward(next(module for module in model.modules() if type(module) is Qwen3MoeExperts))
    assert_close(outcome(ours, rows()), outcome(theirs, rows()), rtol=0, atol=0)
    assert calls == {"experts_forward": 1}


@pytest.mark.parametrize("kind", ["eager", "grouped_mm"])
@pytest.mark.parametrize("targets", [STACKS["target_parameters"], STACKS["target_parameters"][1:]])
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_experts_come_to_what_peft_does_also_at_other_ranks(dtype, targets, kind, calls):
    theirs, ours = expert_models(kind, dtype, target_parameters=targets, use_rslora=True)
    for rank in (3, 2):
        for model in (theirs, ours):
            dynrank.resize(model, rank, optimizers=())
        got, expected = outcome(ours, rows().to(dtype)), outcome(theirs, rows().to(dtype))
        assert [tensor.dtype for tensor in got] == [tensor.dtype for tensor in expected]
        assert_near(got, expected, 1e-5 if dtype is torch.float32 else 3e-2)
    assert calls == {"experts_forward": 2}


def owner_of(model):
    return layers(model)[0].get_base_layer()


OF_EXPERTS = CHANGES | {
    "a trained base": (lambda model: owner_of(model).down_proj.requires_grad_(), False),
    "a hook on the experts": (lambda model: owner_of(model).register_forward_hook(lambda m, x, y: 2 * y), False),
    "a hook on the inner wrapper": (lambda model: layers(model)[1].register_forward_hook(lambda m, x, y: 2 * y), True),
    "no adapter inside": (lambda model: setattr(layers(model)[1], "_active_adapter", ["none"]), False),
}


@pytest.mark.filterwarnings("ignore:Adapter default was active which is now deleted:UserWarning")
@pytest.mark.parametrize("name", OF_EXPERTS)
def test_experts_decide_in_each_call_and_take_adapters_as_in_peft(name, calls):
    change, by_op = OF_EXPERTS[name]
    theirs, ours = expert_models()
    for model in (theirs, ours):
        torch.manual_seed(3)
        change(model)
    assert repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert_near(outcome(ours, rows()), outcome(theirs, rows()), 1e-5)
    assert calls["experts_forward"] == by_op


@pytest.mark.parametrize(("width", "count", "expected"), [(16, 8, 1), (16, 9, 0), (17, 8, 0)])
def test_experts_compute_by_the_op_up_to_the_rows_for_which_it_pays(width, count, expected, calls, monkeypatch):
    """Of 8 rows each of the 4 experts gets 4 on average, a quarter of the 16 columns."""
    monkeypatch.setattr(peft_op, "experts_pay", backends.experts_pay)
    monkeypatch.setattr(backends, "CPU_EXPERTS", {torch.float32: backends.ExpertSize(width, 0.25)})
    theirs, ours = expert_models()
    assert_near(outcome(ours, rows(count)), outcome(theirs, rows(count)), 1e-5)
    assert calls["experts_forward"] == expected


@pytest.mark.parametrize("key", backends.CPU_SIZES, ids=str)
def test_the_op_pays_from_the_size_of_the_table_on(key):
    weight, computes, dropout = key
    tokens, elements = size = backends.CPU_SIZES[key]
    without = backends.CPU_SIZES[weight, computes, False]
    assert min(size) > 0
    assert (tokens >= without.tokens, elements >= without.elements) == (True, True)
    wide = math.ceil(elements / tokens)
    with torch.autocast("cpu", computes, enabled=weight != computes):
        for shape in ((tokens, wide), (1, tokens, wide)):
            assert backends.may_pay(torch.empty(shape, dtype=weight))
            assert backends.op_pays(torch.empty(shape, dtype=weight), wide, weight, dropout)
        for shape, d_out in (
            ((tokens, wide - 1), wide),
            ((tokens, wide), wide - 1),
            ((tokens - 1, 2 * wide), 2 * wide),
        ):
            assert not backends.op_pays(torch.empty(shape, dtype=weight), d_out, weight, dropout)
    x = torch.empty(tokens, wide, dtype=torch.float64)
    assert not backends.op_pays(x, wide, torch.float64, dropout)


def test_small_layers_take_plain_operations_and_large_ones_the_op(calls, monkeypatch):
    monkeypatch.setattr(peft_op, "op_pays", backends.op_pays)
    monkeypatch.setattr(backends, "CPU_SIZES", {(torch.float32, torch.float32, False): backends.Size(14, 14 * 12)})
    theirs = wrapped()
    assert_near(outcome(dynrank.apply_lora_kernel(copy.deepcopy(theirs))), outcome(theirs), 1e-5)
    # The first layer is 12 wide on its narrower side, and the second one 3.
    assert calls == {"add_update": 1, "lora_linear": 1}


def test_the_tables_agree_with_all_rows_that_were_measured():
    results = Path(dynrank.__file__).parents[1] / "scripts" / "bench" / "results" / "sizes.csv"
    with results.open(encoding="utf-8", newline="") as file:
        measured = list(csv.DictReader(file))
    found = Counter()
    for row in measured:
        weight, computes = (getattr(torch, row[name]) for name in ("weight", "computes"))
        x = torch.empty(int(row["tokens"]), int(row["width"]), dtype=weight)
        if row["experts"] == "0":
            with torch.autocast("cpu", computes, enabled=weight != computes):
                pays = backends.op_pays(x, x.shape[-1], weight, row["dropout"] == "yes")
        else:
            pays = backends.experts_pay(x, int(row["tokens"]) * int(row["chosen"]) / int(row["experts"]))
        if pays:
            assert float(row["ratio"]) <= 1, row
        found[row["experts"] != "0", weight, computes, row["dropout"] == "yes"] += pays
    assert {key[1:] for key in found if not key[0]} == backends.CPU_SIZES.keys()
    assert {key[1] for key in found if key[0]} == backends.CPU_EXPERTS.keys()
    assert min(found.values()) > 0
