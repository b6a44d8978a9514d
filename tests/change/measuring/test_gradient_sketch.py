"""The sketch against the dense gradient of the weight, which autograd gives when the weight is not frozen."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

import dynrank
from dynrank.change.measuring import GradientSketch, Needs, Window
from dynrank.change.resize import resize
from dynrank.errors import ConfigurationError
from dynrank.linalg import grow_product
from dynrank.schedules import How


def problem(base=None, d_in=12, d_out=10, rank=2, dropout=0.0):
    """(net of one LoRA layer, two batches whose inputs have few directions)."""
    torch.manual_seed(0)
    base = base or nn.Linear(d_in, d_out)
    net = dynrank.add_lora(nn.Sequential(base), rank=rank, target_modules=["0"], dropout=dropout)
    nn.init.normal_(net[0].lora_B)
    generator = torch.Generator().manual_seed(1)
    return net, [torch.randn(3, 5, d_in, generator=generator) for _ in range(2)]


def loss_of(y):
    return (y.sin() + y.square()).mean()


def dense_gradient(net, batches):
    """The loss's gradient at the whole weight (d_out, d_in), summed over the batches."""
    layer = net[0]
    total = 0.0
    for x in batches:
        weight = (layer._weight_OI() + layer.scaling * layer.lora_B @ layer.lora_A).detach().requires_grad_()
        loss_of(nn.functional.linear(x, weight, layer.bias)).backward()
        total = total + weight.grad.double()
    return total


def sketch_of(net, batches, count, seed=3):
    sketch = GradientSketch({"0": net[0]}, count, seed)
    for x in batches:
        loss_of(net(x)).backward()
        sketch.end_step()
    sketch.close()
    return sketch.of("0")


@pytest.mark.parametrize("make", [lambda: nn.Linear(12, 10), lambda: Conv1D(10, 12)])
def test_sketch_is_random_combinations_of_the_rows_of_the_summed_gradient(make):
    net, batches = problem(make())
    sketch, gradient = sketch_of(net, batches, count=4), dense_gradient(net, batches)
    assert sketch.shape == (12, 12)
    omega = torch.randn(10, 12, generator=torch.Generator().manual_seed(3)).double()
    assert_close(sketch, omega.mT @ gradient, rtol=1e-4, atol=1e-5)  # passes and products in float32


def test_sketch_with_enough_columns_spans_the_rows_of_the_gradient():
    net, batches = problem()
    sketch, gradient = sketch_of(net, batches, count=4), dense_gradient(net, batches)
    rows = torch.linalg.svd(gradient, full_matrices=False).Vh  # all 10 of them
    found = torch.linalg.qr(sketch.mT).Q[:, :10] if sketch.shape[0] == 10 else torch.linalg.svd(sketch).Vh[:10].mT
    cosines = torch.linalg.svdvals(rows @ found)
    assert_close(cosines, torch.ones_like(cosines), rtol=0, atol=1e-4)


def low_rank_batch(rank, d_in=12, seed=5):
    """Inputs and output weights that make a gradient of this rank."""
    generator = torch.Generator().manual_seed(seed)
    spread = 2.0 ** -torch.arange(rank)
    return (torch.randn(40, rank, generator=generator) * spread) @ torch.randn(rank, d_in, generator=generator)


def test_growth_along_the_sketch_finds_the_top_singular_vectors_of_the_gradient_outside_the_old_rows():
    net, _ = problem(d_in=12, d_out=10, rank=2)
    x = low_rank_batch(5)  # a gradient of rank 5: a sketch of 3 + 8 combinations spans its rows
    gradient = dense_gradient(net, [x])
    layer = net[0]
    rows = torch.linalg.svd(layer.lora_A.detach().double(), full_matrices=False).Vh
    outside = torch.eye(12, dtype=torch.float64) - rows.mT @ rows
    _, s, vh = torch.linalg.svd(gradient @ outside)
    sketch = sketch_of(net, [x], count=3)
    change = grow_product(layer.lora_B, layer.lora_A, 5, along=sketch)
    new = change.lora_A[2:].detach().double()
    new = new / new.norm(dim=1, keepdim=True)
    caught = (gradient @ new.mT).norm() / s[:3].norm()
    # a randomised range finder: close to the best three directions, far from three random ones
    assert caught > 0.9
    # with the whole span asked for, the directions are the gradient's own
    whole = grow_product(layer.lora_B, layer.lora_A, 7, along=sketch_of(net, [x], count=5)).lora_A[2:].double()
    whole = whole / whole.norm(dim=1, keepdim=True)
    assert_close(torch.linalg.svdvals(whole @ vh[:5].mT), torch.ones(5, dtype=torch.float64), rtol=0, atol=1e-3)


def test_growth_along_the_sketch_of_a_gradient_of_one_direction_takes_it():
    net, _ = problem()
    x = low_rank_batch(1)
    gradient = dense_gradient(net, [x])
    rows = torch.linalg.svd(net[0].lora_A.detach().double(), full_matrices=False).Vh
    outside = torch.eye(12, dtype=torch.float64) - rows.mT @ rows
    top = torch.linalg.svd(gradient @ outside).Vh[0]
    window = Window({"0": net[0]}, Needs(new_rows=1), span=1)
    loss_of(net(x)).backward()
    resize(net, 3, how=How(new_rows="gradient"), measured=window)
    row = net[0].lora_A[2].detach().double()
    assert_close((row @ top).abs() / row.norm(), torch.tensor(1.0, dtype=torch.float64), rtol=0, atol=1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
def test_sketch_under_gradient_checkpointing_counts_once(reentrant):
    net, batches = problem()
    plain = sketch_of(net, batches, 2)
    sketch = GradientSketch({"0": net[0]}, 2, 3)
    for x in batches:
        loss_of(checkpoint(net, x.requires_grad_(), use_reentrant=reentrant)).backward()
    sketch.close()
    assert torch.equal(sketch.of("0"), plain)


def test_sketch_leaves_the_passes_alone_and_stops_when_closed():
    net, (x, _) = problem()

    def passes():
        net.zero_grad()
        y = net(x)
        loss_of(y).backward()
        return y.detach().clone(), net[0].lora_A.grad.clone(), net[0].lora_B.grad.clone()

    before = passes()
    sketch = GradientSketch({"0": net[0]}, 2, 3)
    during = passes()
    with torch.no_grad():
        net(x)  # no gradient, nothing to add
    sketch.close()
    total = sketch.of("0").clone()
    after = passes()
    assert total.any()
    assert torch.equal(sketch.of("0"), total)
    for mine, other, third in zip(before, during, after, strict=True):
        assert torch.equal(mine, other)
        assert torch.equal(mine, third)


def test_sketch_draws_the_same_for_one_seed_and_goes_on_from_its_state(tmp_path):
    net, batches = problem()
    whole = sketch_of(net, batches, 2)
    head = GradientSketch({"0": net[0]}, 2, 3)
    loss_of(net(batches[0])).backward()
    head.close()
    torch.save(head.state_dict(), tmp_path / "state")
    tail = GradientSketch({"0": net[0]}, 2, 3)
    tail.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    loss_of(net(batches[1])).backward()
    assert torch.equal(tail.of("0"), whole)
    tail.close()
    assert not torch.allclose(sketch_of(net, batches, 2, seed=4), whole)


@pytest.mark.parametrize("base", [nn.Embedding(20, 8), nn.Conv2d(3, 8, 3)])
def test_sketch_refuses_layers_without_a_matrix_of_features(base):
    net = dynrank.add_lora(nn.Sequential(base), rank=2, target_modules=["0"])
    with pytest.raises(ConfigurationError, match=rf"'0' adapts a {type(base).__name__}.*schedule\.new_rows"):
        GradientSketch({"0": net[0]}, 2, 0)
