"""The layers that share a pass over x, against the layers one by one."""

import pytest
import torch
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from dynrank.kernels.dropout import keep_mask, keep_rate
from dynrank.kernels.grouped_lora_linear import Member, SharedInput
from dynrank.kernels.lora_linear import lora_linear, lora_linear_reference

D_IN = 6
SIZES = ((8, 3, 1.5), (4, 2, 0.5), (4, 1, 2.0))  # d_out, rank, scaling: grouped-query attention at unlike ranks
SEED = torch.tensor(3)


def members(dtype=torch.float64, factors=None, bias=True):
    draw = torch.Generator().manual_seed(0)

    def random(*shape, of=dtype):
        return torch.randn(shape, dtype=torch.float64, generator=draw).to(of)

    return [
        Member(
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


def grouped(x, group, p=0.0, seed=SEED, taps=(None, None, None)):
    shared = SharedInput(x, group, p, seed)
    return [shared.output(index, tap) for index, tap in enumerate(taps)]


def singly(x, group, p=0.0, seed=SEED, taps=(None, None, None)):
    operands = [(m.weight, m.bias, m.lora_A, m.lora_B, m.scaling) for m in group]
    return [lora_linear(x, *each, p, seed, tap=tap) for each, tap in zip(operands, taps, strict=True)]


def gradients(ys, leaves):
    draw = torch.Generator().manual_seed(2)
    dys = [torch.randn(y.shape, dtype=torch.float64, generator=draw).to(y.dtype) for y in ys]
    return torch.autograd.grad(ys, leaves, dys, allow_unused=True)


def leaves_of(x, group):
    leaves = [x, *(factor for m in group for factor in (m.lora_A, m.lora_B))]
    return [leaf for leaf in leaves if leaf.requires_grad]


@pytest.mark.parametrize("p", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch", [(7,), (), (2, 3), (0,)])
def test_outputs_and_gradients_are_those_of_the_layers_one_by_one(batch, bias, p):
    x, group = inputs(*batch), members(bias=bias)
    results = []
    for function in (grouped, singly):
        ys = function(x, group, p)
        results.append([*ys, *gradients(ys, leaves_of(x, group))])
    for one, other in zip(*results, strict=True):
        assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_it_is_the_formula_with_one_mask():
    x, group = inputs(5), members()
    keep = keep_mask(5, D_IN, 0.4, SEED).double().abs() / keep_rate(0.4)
    expected = [lora_linear_reference(x, m.weight, m.bias, m.lora_A, m.lora_B, m.scaling, keep) for m in group]
    for one, other in zip(grouped(x, group, 0.4), expected, strict=True):
        assert_close(one, other)


def with_factors(group, factors):
    pairs = zip(factors[::2], factors[1::2], strict=True)
    return [Member(m.weight, m.bias, *pair, m.scaling) for m, pair in zip(group, pairs, strict=True)]


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_gradients_equal_finite_differences(p):
    group = members()
    assert torch.autograd.gradcheck(
        lambda x, *factors: tuple(grouped(x, with_factors(group, factors), p)), leaves_of(inputs(4), group)
    )


@pytest.mark.parametrize("asked", [(0,), (2,), (0, 2), (1, 2), (2, 0)])
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_an_output_that_is_not_asked_for_or_not_used_has_no_part_in_the_gradients(asked, p):
    x, group = inputs(5), members()
    expected = gradients([singly(x, group, p)[i] for i in asked], leaves_of(x, group))
    all_ys, shared = grouped(x, group, p), SharedInput(x, group, p, SEED)
    for ys in ([all_ys[i] for i in asked], [shared.output(i) for i in asked]):
        for one, other in zip(gradients(ys, leaves_of(x, group)), expected, strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("needs", ["x", "A", "B", "one A", "x and one B", "one member"])
def test_only_the_gradients_that_are_needed_are_given(needs):
    x, group = inputs(5), members()
    needed = {
        "x": [x],
        "A": [m.lora_A for m in group],
        "B": [m.lora_B for m in group],
        "one A": [group[1].lora_A],
        "x and one B": [x, group[2].lora_B],
        "one member": [group[0].lora_A, group[0].lora_B],
    }[needs]
    for leaf in leaves_of(x, group):
        leaf.requires_grad_(any(leaf is one for one in needed))
    ours, theirs = grouped(x, group, 0.4), singly(x, group, 0.4)
    assert [y.requires_grad for y in ours] == [y.requires_grad for y in theirs]
    got, expected = (gradients([y for y in ys if y.requires_grad], needed) for ys in (ours, theirs))
    for one, other in zip(got, expected, strict=True):
        assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_nothing_is_recorded_where_nothing_needs_a_gradient():
    x, group = inputs(5), members()
    with torch.no_grad():
        ys = grouped(x, group)
    assert not any(y.requires_grad for y in ys)
    for one, other in zip(ys, singly(x, group), strict=True):
        assert_close(one, other.detach(), rtol=1e-12, atol=1e-12)


def saved_of(function):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        kept = function()
    return saved, kept


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_x_and_the_ranks_are_saved_once_and_nothing_of_their_length_besides(p):
    x, group = inputs(64), members()
    saved, _ = saved_of(lambda: grouped(x, group, p))
    long = [tensor for tensor in saved if 64 in tensor.shape]
    assert sorted([*tensor.shape] for tensor in long) == [[64, sum(rank for _, rank, _ in SIZES)], [64, D_IN]]
    assert any(tensor.data_ptr() == x.data_ptr() for tensor in long)


def test_handles_take_no_memory():
    shared = SharedInput(inputs(1000), members())
    assert all(handle.untyped_storage().nbytes() == 8 for handle in shared._handles)


def test_one_product_each_way_has_the_width_of_x():
    """x is read by one product with all A, and by one for all dA; dx is made once, and added to in place."""
    x, group = inputs(64), members(bias=False)
    ranks, products = sum(rank for _, rank, _ in SIZES), []
    with torch.profiler.profile(record_shapes=True) as profile:
        gradients(grouped(x, group), leaves_of(x, group))
    for event in profile.events():
        if event.name == "aten::mm":
            (rows, inner), (_, columns) = event.input_shapes[:2]
            products.append((rows, inner, columns))
        assert not (event.name in ("aten::add", "aten::add_") and [64, D_IN] in event.input_shapes)
    assert sorted(each for each in products if D_IN in each) == sorted(
        [(64, D_IN, ranks), (ranks, 64, D_IN), (64, ranks, D_IN)]
    )


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_autocast_makes_it_what_the_layers_make_of_it(p):
    x, group = inputs(16, dtype=torch.float32), members(torch.float32)
    results = []
    for function in (grouped, singly):
        with torch.autocast("cpu", torch.bfloat16):
            ys = function(x, group, p)
        results.append([*ys, *gradients(ys, leaves_of(x, group))])
    for one, other in zip(*results, strict=True):
        assert one.dtype == other.dtype
        assert (one - other).norm() <= 2**-6 * other.norm()  # dx is rounded in another order


def test_factors_wider_than_x_keep_their_precision():
    x, group = inputs(64, dtype=torch.bfloat16), members(torch.bfloat16, factors=torch.float32)
    got, expected = (gradients(function(x, group), leaves_of(x, group)) for function in (grouped, singly))
    for index, (one, other) in enumerate(zip(got, expected, strict=True)):
        assert one.dtype == other.dtype
        assert (one - other).norm() <= (1e-6 if index else 2**-6) * other.norm()


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_changes_nothing(reentrant):
    group, results = members(), []

    def part(x, *factors):
        return sum(y.square().sum(-1) for y in grouped(x, with_factors(group, factors), 0.5))

    for function in (part, lambda *leaves: checkpoint(part, *leaves, use_reentrant=reentrant)):
        leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves_of(inputs(5), group)]
        y = function(*leaves)
        y.sum().backward()
        results.append([y.detach(), *(leaf.grad for leaf in leaves)])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_second_gradients_are_refused():
    x, group = inputs(5), members()
    (first,) = torch.autograd.grad(sum(y.square().sum() for y in grouped(x, group)), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.square().sum().backward()


def test_outputs_may_be_changed_in_place():
    x, group = inputs(2, 3), members()
    ys = [torch.relu_(y) for y in grouped(x, group)]
    expected = [torch.relu(y) for y in singly(x, group)]
    for one, other in zip(*(gradients(each, leaves_of(x, group)) for each in (ys, expected)), strict=True):
        assert_close(one, other)


def test_taps_see_what_they_see_in_the_layers_one_by_one():
    x, group, seen = inputs(5), members(), []
    for function in (grouped, singly):
        seen.append({})
        taps = [lambda z, dz, at=index, to=seen[-1]: to.update({at: (z, dz)}) for index in range(3)]
        gradients(function(x, group, 0.4, taps=taps), [x])
    assert set(seen[0]) == {0, 1, 2}
    for index in range(3):
        for one, other in zip(seen[0][index], seen[1][index], strict=True):
            assert_close(one, other)
            assert not one.requires_grad


def test_it_says_when_a_backward_has_gone_through():
    shared = SharedInput(inputs(5), members())
    y = shared.output(0)
    assert not shared.spent
    y.sum().backward()
    assert shared.spent


def test_faults_are_refused():
    x, group = inputs(5), members()
    with pytest.raises(ValueError, match="one dtype"):
        SharedInput(x, [group[0], members(torch.float32)[1]])
    with pytest.raises(ValueError, match="one dtype"):
        SharedInput(x, [])
    with pytest.raises(ValueError, match=r"x must be \(\.\.\., 6\)"):
        SharedInput(x[:, :4], group)
    with pytest.raises(ValueError, match="dropout needs a seed"):
        SharedInput(x, group, 0.1)
    with pytest.raises(ValueError, match="x, weight and bias must have one dtype"):
        SharedInput(x.float(), group)
