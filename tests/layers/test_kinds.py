"""Each kind of layer against the dense layer that it stands for, and float64 autograd of the formula."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from trained import updated
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.pytorch_utils import Conv1D

from dynrank.errors import ConfigurationError
from dynrank.layers.kinds import LoRALinear, layer_class

RANK = 3
SCALING = 5 / 3
IDS = torch.tensor([[0, 3, 2], [1, 9, 2]])
KINDS = {
    "linear": (lambda: nn.Linear(7, 6), lambda: torch.randn(4, 7)),
    "linear-1d": (lambda: nn.Linear(7, 6), lambda: torch.randn(7)),
    "linear-3d-no-bias": (lambda: nn.Linear(7, 6, bias=False), lambda: torch.randn(2, 4, 7)),
    "conv1d": (lambda: Conv1D(6, 7), lambda: torch.randn(2, 4, 7)),
    "embedding": (lambda: nn.Embedding(10, 6), lambda: IDS),
    "embedding-padding": (lambda: nn.Embedding(10, 6, padding_idx=2), lambda: IDS),
    "embedding-by-count": (lambda: nn.Embedding(10, 6, scale_grad_by_freq=True), lambda: IDS),
    "conv2d-1x1": (lambda: nn.Conv2d(4, 6, 1, bias=False), lambda: torch.randn(2, 4, 5, 5)),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 5), stride=(2, 1), padding=(1, 2)), lambda: torch.randn(2, 4, 9, 8)),
    "conv2d-same": (lambda: nn.Conv2d(4, 6, 3, padding="same"), lambda: torch.randn(4, 7, 8)),
}


@pytest.fixture(params=KINDS)
def kind(request):
    """(base layer, an input for it)."""
    torch.manual_seed(0)
    make, sample = KINDS[request.param]
    base = make()
    nn.init.normal_(base.weight)
    return base, sample()


def adapt(base, **options):
    # As a model has it; a base that is trained is computed by the plain formula.
    return updated(layer_class(base)(copy.deepcopy(base).requires_grad_(False), rank=RANK, scaling=SCALING, **options))


def dense_delta(base, lora_A, lora_B):
    """The update in the base's weight's shape, written out anew."""
    product = SCALING * lora_B @ lora_A
    return product.T if isinstance(base, Conv1D | nn.Embedding) else product.reshape(base.weight.shape)


def test_base_that_is_unfrozen_gets_its_gradients(kind):
    base, x = kind
    layer = adapt(base)
    layer.base.requires_grad_(True)
    merged = copy.deepcopy(base).double()
    merged.weight.data += dense_delta(base, layer.lora_A, layer.lora_B).detach().double()
    layer(x).square().sum().backward()
    merged(x.double() if x.is_floating_point() else x).square().sum().backward()
    for name, parameter in layer.base.named_parameters():
        assert_close(parameter.grad.double(), merged.get_parameter(name).grad, rtol=1e-4, atol=1e-4)


def in_float64(module, x):
    return copy.deepcopy(module).double()(x.double() if x.is_floating_point() else x)


def test_forward_equals_the_layer_with_the_dense_update(kind):
    base, x = kind
    layer = adapt(base).double()
    dense = copy.deepcopy(base).double()
    delta = dense_delta(base, layer.lora_A, layer.lora_B)
    with torch.no_grad():
        dense.weight += delta
    assert_close(in_float64(layer, x), in_float64(dense, x))
    assert_close(layer.delta_weight(), delta)


@pytest.mark.parametrize("base", [nn.Linear(7, 6), Conv1D(6, 7)], ids=["linear", "conv1d"])
def test_fused_op_is_the_reference(base):
    layer = adapt(base).double()
    x = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    seen = []
    layer.base.double()
    for layer.backend in ("auto", "reference"):
        y = layer(x)
        seen.append((y, *torch.autograd.grad(y.square().sum(), (x, layer.lora_A, layer.lora_B))))
    assert_close(*seen)
    # Only the plain operations have second derivatives.
    (gradient,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    gradient.sum().backward()


@pytest.mark.parametrize("base", [nn.Linear(7, 6), Conv1D(6, 7)], ids=["linear", "conv1d"])
def test_hooks_of_the_base_run(base):
    layer = adapt(base)
    x = torch.randn(4, 7)
    y = layer(x)
    seen = []
    layer.base.register_forward_hook(lambda *call: seen.append(call[2]))
    layer.base.register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,))
    assert_close(layer(x) - y, base(x + 1) - base(x), rtol=1e-4, atol=1e-5)
    assert_close(seen, [base(x + 1)])


# torch calls its tracer deprecated.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("shape", [(4, 7), (2, 4, 7)])
def test_a_traced_layer_computes_what_the_layer_does_also_for_other_inputs(shape, grad):
    layer = adapt(nn.Linear(7, 6))
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(layer, torch.randn(shape))
    x = torch.randn(3, *shape[1:])
    assert_close(traced(x), layer(x))


def test_gradients_of_each_example_by_torch_func_are_those_of_a_backward():
    layer = adapt(nn.Linear(7, 6))
    x = torch.randn(4, 7)
    factors = {"lora_A": layer.lora_A.detach(), "lora_B": layer.lora_B.detach()}

    def loss(factors, x):
        return torch.func.functional_call(layer, factors, x).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(factors, x)
    for i, row in enumerate(x):
        expected = torch.autograd.grad(layer(row).square().sum(), (layer.lora_A, layer.lora_B))
        assert_close((found["lora_A"][i], found["lora_B"][i]), expected)


def test_dropout_has_a_mode_of_its_own():
    """To estimate uncertainty, dropout alone is set to train()."""
    layer = adapt(nn.Linear(7, 6), dropout=0.5)
    x = torch.randn(4, 7)
    for training in (True, False):
        layer.train(training)
        layer.dropout.train(not training)
        assert torch.equal(layer(x), layer(x)) == training


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_computes_the_same_with_the_same_mask(reentrant):
    layer = adapt(nn.Linear(7, 6), dropout=0.5)
    x = torch.randn(4, 7, requires_grad=True)
    leaves = (x, layer.lora_A, layer.lora_B)
    results = []
    for forward in (layer, partial(checkpoint, layer, use_reentrant=reentrant)):
        torch.manual_seed(7)
        y = forward(x)
        y.square().sum().backward()
        results.append([y, *(leaf.grad for leaf in leaves)])
        for leaf in leaves:
            leaf.grad = None
    assert all(map(torch.equal, *results))


def test_gradients_equal_float64_autograd_of_the_formula(kind):
    base, x = kind
    layer = adapt(base)
    y = layer(x.requires_grad_() if x.is_floating_point() else x)
    dy = torch.randn_like(y)
    y.backward(dy)

    wide = copy.deepcopy(base).double()
    lora_A, lora_B = (p.detach().double().requires_grad_() for p in (layer.lora_A, layer.lora_B))
    leaf = x.detach().double().requires_grad_() if x.is_floating_point() else x
    weight = wide.weight.detach() + dense_delta(base, lora_A, lora_B)
    torch.func.functional_call(wide, {"weight": weight}, leaf).backward(dy.double())
    # The gradient of lora_A is zero in both where a row is padding.
    pairs = [(layer.lora_A.grad, lora_A.grad)]
    # lora_B learns from the row of the padding, too, and from each row as often as it comes, as PEFT's.
    if getattr(base, "padding_idx", None) is None and not getattr(base, "scale_grad_by_freq", False):
        pairs.append((layer.lora_B.grad, lora_B.grad))
    if x.is_floating_point():
        pairs.append((x.grad, leaf.grad))
    for got, expected in pairs:
        assert_close(got.double(), expected, rtol=1e-4, atol=1e-4)


def test_dropout_acts_on_the_update_in_training_only(kind):
    base, x = kind
    layer = adapt(base, dropout=0.5)
    plain = adapt(base)
    layer.load_state_dict(plain.state_dict())
    layer.eval()
    assert torch.equal(layer(x), plain(x))
    layer.train()
    torch.manual_seed(1)
    dropped = torch.stack([layer(x) for _ in range(400)])
    assert not torch.allclose(dropped[0], dropped[1])
    # unbiased: the mean over 400 draws lies within 6 of its standard errors, and one draw's spread is not zero
    error = dropped.std(0) / 20
    assert ((dropped.mean(0) - plain(x)).abs() <= 6 * error + 1e-4).all()


def test_forward_of_a_bfloat16_base_keeps_float32_factors(kind):
    base, x = kind
    half = copy.deepcopy(base).bfloat16()
    layer = adapt(half)
    assert layer.lora_A.dtype == layer.lora_B.dtype == torch.float32
    x = x.bfloat16() if x.is_floating_point() else x
    y = layer(x)
    assert y.dtype == torch.bfloat16
    exact = in_float64(layer, x)
    # x, A, B and the sums are each rounded to 2**-8.
    assert_close(y.double(), exact, rtol=0, atol=0.03 * exact.abs().max().item())
    y.float().sum().backward()
    assert layer.lora_A.grad.dtype == torch.float32


@pytest.mark.parametrize("training", [False, True])
def test_forward_under_autocast_has_the_dtype_of_the_base_under_autocast(kind, training):
    base, x = kind
    layer = adapt(base, dropout=0.3).train(training)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        expected = base(x)
    assert y.dtype == expected.dtype
    if not training:
        exact = in_float64(layer, x)
        assert_close(y.double(), exact, rtol=0, atol=0.03 * exact.abs().max().item())
    y.float().square().sum().backward()
    assert layer.lora_B.grad.dtype == torch.float32
    assert layer.lora_B.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("base", "option"),
    [
        (nn.Conv2d(4, 6, 3, groups=2), "groups"),
        (nn.Conv2d(4, 6, 3, dilation=2), "dilation"),
        (nn.Conv2d(4, 6, 3, padding_mode="reflect"), "padding_mode"),
        (nn.Embedding(10, 6, max_norm=0.5), "max_norm"),
    ],
)
def test_what_the_layer_or_peft_would_compute_differently_is_refused(base, option):
    with pytest.raises(ConfigurationError, match=f"needs {option}="):
        layer_class(base)(base, rank=2, scaling=1.0)


class NamedLinear(nn.Linear):
    """A subclass that computes what its parent does."""


def test_layer_class_takes_subclasses_of_the_plain_layer_and_nothing_else():
    """tests/layers/test_choosing.py has a subclass with a forward of its own."""
    expected = {NamedLinear: LoRALinear, FalconLinear: LoRALinear, partial(nn.Conv1d, kernel_size=1): None}
    assert {kind: layer_class(kind(30, 20)) for kind in expected} == expected
