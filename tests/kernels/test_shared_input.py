"""The layers that share a pass over x, against the layers one by one."""

import pytest
import torch
from torch.testing import assert_close

from dynrank.kernels.lora_linear import Operands, SharedInput, lora_linear

D_IN = 6
# Each layer has (d_out, rank, scaling), as in grouped-query attention at unlike ranks.
SIZES = ((8, 3, 1.5), (4, 2, 0.5), (4, 1, 2.0))
SEED = torch.tensor(3)


def layers(dtype=torch.float64, factors=None, bias=True):
    draw = torch.Generator().manual_seed(0)

    def random(*shape, of=dtype):
        return torch.randn(shape, dtype=torch.float64, generator=draw).to(of)

    return [
        Operands(
            random(d_out, D_IN),
            random(d_out) if bias else None,
            random(rank, D_IN, of=factors or dtype).requires_grad_(),
            random(d_out, rank, of=factors or dtype).requires_grad_(),
            scaling,
        )
        for d_out, rank, scaling in SIZES
    ]


def inputs(*batch, dtype=torch.float64):
    x = torch.randn(*batch, D_IN, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return x.to(dtype).requires_grad_()


def together(x, group, p=0.0):
    shared = SharedInput(x, group, p, SEED if p else None)
    return [shared.output(index) for index in range(len(group))]


def singly(x, group, p=0.0):
    return [lora_linear(x, *layer[:5], p, SEED) for layer in group]


def gradients(ys, leaves):
    draw = torch.Generator().manual_seed(2)
    dys = [torch.randn(y.shape, dtype=torch.float64, generator=draw).to(y.dtype) for y in ys]
    return torch.autograd.grad(ys, leaves, dys, allow_unused=True)


def leaves_of(x, group):
    return [x, *(factor for layer in group for factor in (layer.lora_A, layer.lora_B))]


def assert_same(one, other, tolerance=1e-12):
    for got, expected in zip(one, other, strict=True):
        assert (got is None) == (expected is None)
        if got is not None:
            assert_close(got, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("p", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch", [(7,), (), (2, 3), (0,)])
def test_outputs_and_gradients_are_those_of_the_layers_one_by_one(batch, bias, p):
    x, group = inputs(*batch), layers(bias=bias)
    ours, theirs = together(x, group, p), singly(x, group, p)
    assert_same(ours, theirs)
    assert_same(*(gradients(ys, leaves_of(x, group)) for ys in (ours, theirs)))


@pytest.mark.parametrize("asked", [(0,), (0, 2), (2, 1)])
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_an_output_that_is_not_asked_for_or_not_used_has_no_part_in_the_gradients(asked, p):
    x, group = inputs(5), layers()
    expected = gradients([singly(x, group, p)[i] for i in asked], leaves_of(x, group))
    unused, shared = together(x, group, p), SharedInput(x, group, p, SEED if p else None)
    for ys in ([unused[i] for i in asked], [shared.output(i) for i in asked]):
        assert_same(gradients(ys, leaves_of(x, group)), expected)


@pytest.mark.parametrize("needs", ["x", "A", "B", "A and B", "nothing"])
def test_only_the_gradients_that_are_needed_are_given(needs):
    x, group = inputs(5), layers()
    x.requires_grad_(needs == "x")
    for layer in group:
        layer.lora_A.requires_grad_("A" in needs)
        layer.lora_B.requires_grad_("B" in needs)
    ours, theirs = together(x, group, 0.4), singly(x, group, 0.4)
    assert [y.requires_grad for y in ours] == [y.requires_grad for y in theirs] == [needs != "nothing"] * 3
    if needs != "nothing":
        needed = [leaf for leaf in leaves_of(x, group) if leaf.requires_grad]
        assert_same(*(gradients(ys, needed) for ys in (ours, theirs)))


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("count", [1, 3])
def test_x_and_the_ranks_are_saved_once_and_nothing_of_their_length_besides(count, p):
    x, group, saved = inputs(64), layers()[:count], []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        together(x, group, p)
    ranks = sum(rank for _, rank, _ in SIZES[:count])
    long = [tensor for tensor in saved if 64 in tensor.shape]
    assert sorted([*tensor.shape] for tensor in long) == [[64, ranks], [64, D_IN]]
    own = {tensor.data_ptr() for tensor in (*leaves_of(x, group), *(layer.weight for layer in group))}
    assert x.data_ptr() in {tensor.data_ptr() for tensor in long}
    assert sum(tensor.nbytes for tensor in saved if tensor.data_ptr() not in own) <= 64 * ranks * 8 + 64


def test_one_product_each_way_has_the_width_of_x():
    """x is read by one product with all A, and by one for all dA; dx is made once, and added to in place."""
    x, group = inputs(64), layers(bias=False)
    ranks, products = sum(rank for _, rank, _ in SIZES), []
    with torch.profiler.profile(record_shapes=True) as profile:
        gradients(together(x, group), leaves_of(x, group))
    for event in profile.events():
        if event.name == "aten::mm":
            (rows, inner), (_, columns) = event.input_shapes[:2]
            products.append((rows, inner, columns))
        assert not (event.name in ("aten::add", "aten::add_") and [64, D_IN] in event.input_shapes)
    assert sorted(each for each in products if D_IN in each) == sorted(
        [(64, D_IN, ranks), (ranks, 64, D_IN), (64, ranks, D_IN)]
    )


@pytest.mark.parametrize("autocast", [True, False])
def test_mixed_dtypes_give_what_they_give_the_layers_one_by_one(autocast):
    base = torch.float32 if autocast else torch.bfloat16
    x, group = inputs(64, dtype=base), layers(base, factors=torch.float32)
    results = []
    for function in (together, singly):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            ys = function(x, group, 0.5)
        results.append([*ys, *gradients(ys, leaves_of(x, group))])
    for index, (one, other) in enumerate(zip(*results, strict=True)):
        assert one.dtype == other.dtype
        # Only dA and dB have to be exact, because dx is rounded in another order.
        exact = not autocast and index > len(group)
        assert (one - other).norm() <= (1e-6 if exact else 2**-6) * other.norm()
