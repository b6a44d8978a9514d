"""Each kind of layer against the dense layer that it stands for, PEFT's layer, and float64 autograd of the formula."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.testing import assert_close
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.pytorch_utils import Conv1D

from dynrank.errors import ConfigurationError
from dynrank.layers.kinds import LoRALinear, layer_class

# PEFT says so of every Conv1D, and sets the flag itself.
pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")

RANK, ALPHA = 3, 5.0
IDS = torch.tensor([[0, 3, 2], [1, 9, 2]])
KINDS = {
    "linear": (lambda: nn.Linear(7, 6), lambda: torch.randn(4, 7)),
    "linear-1d": (lambda: nn.Linear(7, 6), lambda: torch.randn(7)),
    "linear-3d-no-bias": (lambda: nn.Linear(7, 6, bias=False), lambda: torch.randn(2, 4, 7)),
    "conv1d": (lambda: Conv1D(6, 7), lambda: torch.randn(2, 4, 7)),
    "embedding": (lambda: nn.Embedding(10, 6), lambda: IDS),
    "embedding-padding": (lambda: nn.Embedding(10, 6, padding_idx=2), lambda: IDS),
    "conv2d-3x3": (lambda: nn.Conv2d(4, 6, 3), lambda: torch.randn(2, 4, 7, 8)),
    "conv2d-1x1": (lambda: nn.Conv2d(4, 6, 1, bias=False), lambda: torch.randn(2, 4, 5, 5)),
    "conv2d-stride": (lambda: nn.Conv2d(4, 6, 3, stride=(2, 1), padding=1), lambda: torch.randn(2, 4, 9, 8)),
    "conv2d-padding": (lambda: nn.Conv2d(4, 6, (3, 5), padding=(1, 2)), lambda: torch.randn(2, 4, 7, 8)),
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


def adapt(base, zero=False, **options):
    layer = layer_class(base)(copy.deepcopy(base), rank=RANK, scaling=ALPHA / RANK, **options)
    if not zero:
        nn.init.normal_(layer.lora_B)
    return layer


def dense_delta(layer, base, lora_A, lora_B):
    """The update in the base's weight's shape, written out anew."""
    product = (ALPHA / RANK) * lora_B @ lora_A
    return product.T if isinstance(base, Conv1D | nn.Embedding) else product.reshape(base.weight.shape)


def test_forward_equals_the_base_bit_for_bit_when_the_update_is_zero(kind):
    base, x = kind
    y = adapt(base, zero=True)(x)
    # the linear op adds its two products in another order; addition of an exact zero changes nothing
    assert_close(y, base(x), rtol=1e-6, atol=1e-6)


def test_forward_equals_the_layer_with_the_dense_update(kind):
    base, x = kind
    layer = adapt(base).double()
    dense = copy.deepcopy(base).double()
    x = x.double() if x.is_floating_point() else x
    with torch.no_grad():
        dense.weight += dense_delta(layer, base, layer.lora_A, layer.lora_B)
    assert_close(layer(x), dense(x))
    assert_close(layer.delta_weight(), dense_delta(layer, base, layer.lora_A, layer.lora_B))


def test_merge_keeps_the_output_and_unmerge_restores_the_weight_bit_for_bit(kind):
    base, x = kind
    layer = adapt(base)
    y, own = layer(x), layer.weight
    layer.merge()
    assert layer.merged
    assert_close(layer(x), y, rtol=1e-4, atol=1e-4)  # float32 sums of up to 60 terms in another order
    layer.unmerge()
    assert not layer.merged
    assert layer.weight is own
    assert torch.equal(layer.weight, base.weight)


@pytest.mark.parametrize("rslora", [False, True])
def test_forward_agrees_with_peft(kind, rslora):
    base, x = kind
    config = LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=["0"], init_lora_weights=False, use_rslora=rslora, lora_dropout=0.0
    )
    model = get_peft_model(nn.Sequential(copy.deepcopy(base)), config).base_model.model
    theirs = model[0]
    if isinstance(base, nn.Embedding):
        lora_A, lora_B = theirs.lora_embedding_A["default"], theirs.lora_embedding_B["default"]
    else:
        lora_A, lora_B = theirs.lora_A["default"].weight, theirs.lora_B["default"].weight
    layer = layer_class(base)(
        copy.deepcopy(base), rank=RANK, scaling=ALPHA / (RANK**0.5 if rslora else RANK), dropout=0.0
    )
    with torch.no_grad():
        layer.lora_A.copy_(lora_A.flatten(1))
        layer.lora_B.copy_(lora_B.flatten(1))
    # 1e-5 for outputs of order one; these go up to about 30, and so does float32's rounding
    expected = model(x)
    assert (layer(x) - expected).abs().max() <= 1e-5 * expected.abs().max().clamp(min=1)


def test_gradients_equal_float64_autograd_of_the_formula(kind):
    base, x = kind
    layer = adapt(base)
    y = layer(x.requires_grad_() if x.is_floating_point() else x)
    dy = torch.randn_like(y)
    y.backward(dy)

    wide = copy.deepcopy(base).double()
    lora_A, lora_B = (p.detach().double().requires_grad_() for p in (layer.lora_A, layer.lora_B))
    leaf = x.detach().double().requires_grad_() if x.is_floating_point() else x
    weight = wide.weight.detach() + dense_delta(layer, base, lora_A, lora_B)
    torch.func.functional_call(wide, {"weight": weight}, leaf).backward(dy.double())
    if getattr(base, "padding_idx", None) is not None:
        assert layer.lora_A.grad[:, base.padding_idx].eq(0).all()  # the padding row is never trained ...
        used = torch.arange(10) != base.padding_idx
        assert_close(layer.lora_A.grad[:, used].double(), lora_A.grad[:, used], rtol=1e-4, atol=1e-4)
    else:
        assert_close(layer.lora_A.grad.double(), lora_A.grad, rtol=1e-4, atol=1e-4)  # float32 sums of about 100 terms
        assert_close(layer.lora_B.grad.double(), lora_B.grad, rtol=1e-4, atol=1e-4)
    if x.is_floating_point():
        assert_close(x.grad.double(), leaf.grad, rtol=1e-4, atol=1e-4)


def test_dropout_acts_on_the_update_in_training_only(kind):
    base, x = kind
    layer, plain = adapt(base, dropout=0.5), adapt(base)
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
    exact = copy.deepcopy(layer).double()(x.double() if x.is_floating_point() else x)
    assert_close(y.double(), exact, rtol=0, atol=0.03 * exact.abs().max().item())  # 2**-8 each for x, A, B, and sums
    y.float().sum().backward()
    assert layer.lora_A.grad.dtype == torch.float32


@pytest.mark.parametrize("training", [False, True])
def test_forward_under_autocast_has_the_dtype_of_the_base_under_autocast(kind, training):
    base, x = kind
    layer = adapt(base, dropout=0.3).train(training)
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = layer(x), base(x)
    assert y.dtype == expected.dtype
    if not training:
        exact = copy.deepcopy(layer).double()(x.double() if x.is_floating_point() else x)
        assert_close(y.double(), exact, rtol=0, atol=0.03 * exact.abs().max().item())
    y.float().square().sum().backward()
    assert layer.lora_B.grad.dtype == torch.float32
    assert layer.lora_B.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("base", "options"),
    [
        (lambda **options: nn.Conv2d(4, 6, 3, **options), {"groups": 2}),
        (lambda **options: nn.Conv2d(4, 6, 3, **options), {"dilation": 2}),
        (lambda **options: nn.Conv2d(4, 6, 3, **options), {"padding_mode": "reflect"}),
        (lambda **options: nn.Embedding(10, 6, **options), {"max_norm": 0.5}),
    ],
)
def test_what_the_layer_or_peft_would_compute_differently_is_refused(base, options):
    made = base(**options)
    with pytest.raises(ConfigurationError, match=f"needs {next(iter(options))}="):
        layer_class(made)(made, rank=2, scaling=1.0)


class ScaledLinear(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class NoisyLinear(nn.Linear):
    """Plain in eval."""

    def forward(self, x):
        y = super().forward(x)
        return y + torch.randn_like(y) if self.training else y


class GatedLinear(nn.Linear):
    """Plain until its gate is trained."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.gate = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.gate * super().forward(x)


class TupleLinear(nn.Linear):
    def forward(self, x):
        return super().forward(x), None


class NamedLinear(nn.Linear):
    """A subclass that computes what its parent does."""


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_layer_class_takes_the_subclasses_of_linear_that_compute_the_plain_layer(device):
    with torch.device(device):
        plain = [cls(30, 20, bias=bias).bfloat16() for cls in (NamedLinear, FalconLinear) for bias in (True, False)]
        other = [ScaledLinear(3, 3), NoisyLinear(3, 3).eval(), GatedLinear(3, 3), TupleLinear(3, 3)]
    state = torch.get_rng_state()
    assert [layer_class(base) for base in plain] == [LoRALinear] * 4
    assert [layer_class(base) for base in other] == [None] * 4
    assert [base.training for base in other] == [True, False, True, True]
    assert torch.equal(torch.get_rng_state(), state)


def test_layer_class_takes_no_other_module():
    assert layer_class(nn.ReLU()) is None
    assert layer_class(nn.Conv1d(3, 3, 1)) is None
