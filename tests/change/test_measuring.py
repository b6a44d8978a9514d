"""Gram matrices against explicit sums over positions in float64, for every kind of layer and every way to run it."""

import copy
import pickle
from contextlib import closing

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

import dynrank
from dynrank.change.measuring import Moments
from dynrank.change.predict import predict
from dynrank.change.resize import resize
from dynrank.errors import ConfigurationError
from dynrank.linalg import truncate_product
from dynrank.schedules import How

LAYERS = {
    "linear": (lambda: nn.Linear(10, 8), lambda g: torch.randn(2, 7, 10, generator=g)),
    "conv1d": (lambda: Conv1D(8, 10), lambda g: torch.randn(2, 7, 10, generator=g)),
    "embedding": (lambda: nn.Embedding(20, 8), lambda g: torch.randint(20, (2, 7), generator=g)),
    "conv2d": (
        lambda: nn.Conv2d(3, 8, (3, 2), stride=2, padding=1),
        lambda g: torch.randn(2, 3, 9, 8, generator=g),
    ),
}


def adapted(kind, rank=3, **options):
    """(net of one LoRA layer with an update, its layer, two inputs)."""
    make, draw = LAYERS[kind]
    torch.manual_seed(0)
    net = dynrank.add_lora(nn.Sequential(make()), rank=rank, alpha=6, target_modules=["0"], **options)
    nn.init.normal_(net[0].lora_B)
    generator = torch.Generator().manual_seed(1)
    return net, net[0], [draw(generator) for _ in range(2)]


def features(kind, x, layer):
    """The layer's input as a matrix (positions, d_in) of what lora_A is multiplied with."""
    if kind == "embedding":
        return nn.functional.one_hot(x.flatten(), 20).to(layer.lora_A.dtype)
    if kind == "conv2d":
        columns = nn.functional.unfold(x, (3, 2), stride=2, padding=1)  # (batch, d_in, positions)
        return columns.mT.reshape(-1, columns.shape[1])
    return x.reshape(-1, x.shape[-1])


def positions(kind, y):
    """The layer's output, or a gradient at it, as a matrix (positions, d_out)."""
    return (y.movedim(1, -1) if kind == "conv2d" else y).reshape(-1, 8)


def loss_of(y):
    return (y.sin() * y.exp().clamp(max=3)).mean()


def moments(kind, layer, x, net, loss=loss_of):
    """(sum of z z^T, sum of u u^T, positions) with z = A x and u = B^T g, from the gradient g at the output."""
    y = net(x).detach().requires_grad_()
    loss(y).backward()
    z = features(kind, x, layer).double() @ layer.lora_A.detach().double().mT
    u = positions(kind, y.grad).double() @ layer.lora_B.detach().double()
    assert len(z) == len(u)
    return z.mT @ z, u.mT @ u, len(z)


@pytest.mark.parametrize("kind", LAYERS)
def test_grams_are_the_moments_over_positions(kind):
    net, layer, (x, _) = adapted(kind)
    with closing(Moments({"0": layer})) as grams:
        loss_of(net(x)).backward()
    zz, uu, count = moments(kind, layer, x, net)
    assert grams.of("0", "weight") == (None, None)
    gram_u, gram_z = grams.of("0", "output")
    assert gram_u is None
    assert_close(gram_z, zz / count, rtol=1e-5, atol=1e-6)  # the passes are float32
    gram_u, gram_z = grams.of("0", "loss")
    assert gram_u.dtype == gram_z.dtype == torch.float64
    assert_close(gram_u, uu, rtol=1e-5, atol=1e-5 * float(uu.abs().max()))


@pytest.mark.parametrize("kind", LAYERS)
def test_grams_weigh_steps_exponentially_and_passes_of_a_step_alike(kind):
    """Three optimizer steps, the second with two backward passes; window 3 means that a step weighs half the next."""
    net, layer, inputs = adapted(kind)
    steps = [[inputs[0]], [inputs[1], inputs[0]], [inputs[1]]]
    sums = {"zz": 0.0, "uu": 0.0, "rows": 0.0, "steps": 0.0}
    with closing(Moments({"0": layer}, window=3)) as grams:
        for number, batches in enumerate(steps):
            weight = 0.5 ** (2 - number)
            for x in batches:
                zz, uu, count = moments(kind, layer, x, net)
                for key, value in zip(sums, (zz, uu, count, 0), strict=True):
                    sums[key] = sums[key] + weight * value
                loss_of(net(x)).backward()
            sums["steps"] += weight
            grams.end_step()
            with torch.no_grad():  # the factors move between steps, as in training
                layer.lora_A.mul_(1.3)
                layer.lora_B.add_(0.1)
    gram_u, gram_z = grams.of("0", "loss")
    assert_close(gram_z, sums["zz"] / sums["rows"], rtol=1e-5, atol=1e-6)
    uu = sums["uu"] / sums["steps"]
    assert_close(gram_u, uu, rtol=1e-5, atol=1e-5 * float(uu.abs().max()))


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("autocast", [False, True])
def test_observed_passes_are_bit_equal_to_unobserved_ones(kind, dropout, autocast):
    net, layer, (x, _) = adapted(kind, dropout=dropout)

    def passes():
        torch.manual_seed(4)
        net.zero_grad()
        given = x.clone().requires_grad_() if x.is_floating_point() else x
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = net(given)
        loss_of(y).backward()
        grads = [layer.lora_A.grad, layer.lora_B.grad, given.grad if x.is_floating_point() else None]
        return [y.detach().clone(), *(grad.clone() for grad in grads if grad is not None)]

    before = passes()
    with closing(Moments({"0": layer})) as grams:
        during = passes()
        _, gram_z = grams.of("0", "loss")  # it has been watching
    after = passes()
    for mine, other, third in zip(before, during, after, strict=True):
        assert torch.equal(mine, other)
        assert torch.equal(mine, third)
    assert torch.equal(grams.of("0", "loss")[1], gram_z)  # and has stopped


@pytest.mark.parametrize("kind", LAYERS)
def test_grams_under_dropout_are_of_what_the_update_really_saw(kind):
    """The gradients of the factors tell: dL/dA = (sum of dz x^T), dL/dB = s (sum of g z^T), with one position each."""
    net, layer, (x, _) = adapted(kind, dropout=0.5)
    seen = []
    stop = layer.observe(lambda z, dz: seen.append((z.clone(), dz.clone())))
    torch.manual_seed(4)
    y = net(x)
    y.retain_grad()
    loss_of(y).backward()
    stop()
    ((z, dz),) = seen
    g = positions(kind, y.grad)
    assert_close(layer.lora_B.grad, layer.scaling * g.mT @ z, rtol=1e-5, atol=1e-6)
    if kind != "embedding":  # its dropout falls on z, not on the input
        assert_close(dz, layer.scaling * g @ layer.lora_B, rtol=1e-5, atol=1e-6)
    dropped = features(kind, x, layer) @ layer.lora_A.mT
    assert not torch.allclose(z, dropped)


def test_grams_under_autocast_are_those_of_float32_within_bfloat16():
    net, layer, (x, _) = adapted("linear")
    with closing(Moments({"0": layer})) as grams, torch.autocast("cpu", torch.bfloat16):
        net(x).float().square().mean().backward()
    zz, uu, count = moments("linear", layer, x, net, loss=lambda y: y.square().mean())
    gram_u, gram_z = grams.of("0", "loss")
    assert gram_u.dtype == gram_z.dtype == torch.float64
    # bfloat16 keeps 8 bits: each value is off by up to 0.4%, and sums of products by a few of that
    assert_close(gram_z, zz / count, rtol=0, atol=0.02 * float(gram_z.abs().max()))
    assert_close(gram_u, uu, rtol=0, atol=0.02 * float(uu.abs().max()))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_gradient_checkpointing_counts_once(reentrant, dropout):
    net, layer, (x, _) = adapted("linear", dropout=dropout)
    x, calls = x.requires_grad_(), []
    stop = layer.observe(lambda z, dz: calls.append(len(z)))
    loss_of(checkpoint(net, x, use_reentrant=reentrant)).backward()
    stop()
    assert calls == [14]


def test_nothing_is_collected_without_a_backward_pass():
    net = dynrank.add_lora(nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]), rank=2, target_modules=["0", "1"])
    grams, x = Moments(dict(dynrank.lora_layers(net))), torch.ones(2, 4)
    net[1].eval()(x)
    with torch.no_grad():
        net[1](x)
    net[1].train()(x)  # a forward that nobody follows back
    net[0](x).sum().backward()
    assert grams.of("0", "output")[1] is not None
    with pytest.raises(ConfigurationError, match=r"'1'.*metric=loss.*schedule\.metric=weight.*lora\.target_modules"):
        grams.of("1", "loss")


def test_layer_whose_scaling_is_zero_is_ranked_by_what_passes_through_it():
    """No gradient comes through, and no division by zero is made of that."""
    net, layer, (x, _) = adapted("linear")
    layer.scaling = 0.0
    with closing(Moments({"0": layer}, window=2)) as grams:
        loss_of(net(x)).backward()
        grams.end_step()
    gram_u, gram_z = grams.of("0", "loss")
    assert gram_u is None
    assert_close(gram_z, moments("linear", layer, x, net)[0] / 14, rtol=1e-5, atol=1e-6)
    before = net(x)
    (report,) = resize(net, 2, how=How(metric="loss"), measured=grams)
    assert report.predicted_error == 0
    assert torch.equal(net(x), before)


def test_layer_is_observed_by_one_at_a_time():
    net, layer, _ = adapted("linear")
    with closing(Moments({"0": layer})), pytest.raises(RuntimeError, match="observed already"):
        Moments({"0": layer})
    Moments({"0": layer}).close()  # free again


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_copies_of_an_observed_layer_are_not_observed(copied):
    net, layer, (x, _) = adapted("linear")
    with closing(Moments({"0": layer})) as grams:
        loss_of(copied(net)(x)).backward()
        assert grams.state_dict()["sums"]["0"]["rows"] == 0
        loss_of(net(x)).backward()
        assert grams.state_dict()["sums"]["0"]["rows"] == 14


@pytest.mark.parametrize("cut", [1, 2])
def test_grams_go_on_from_their_state(cut, tmp_path):
    net, layer, inputs = adapted("linear")

    def steps(grams, numbers):
        for number in numbers:
            loss_of(net(inputs[number % 2])).backward()
            grams.end_step()

    with closing(Moments({"0": layer}, window=3)) as whole:
        steps(whole, range(3))
    with closing(Moments({"0": layer}, window=3)) as head:
        steps(head, range(cut))
        torch.save(head.state_dict(), tmp_path / "state")
    with closing(Moments({"0": layer}, window=3)) as tail:
        tail.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
        steps(tail, range(cut, 3))
    assert tail.steps == whole.steps == 3
    for mine, other in zip(tail.of("0", "loss"), whole.of("0", "loss"), strict=True):
        assert torch.equal(mine, other)


# The loss metric predicts


class Quadratic:
    """``L = mean of 1/2 e^T P e``, e = W x - y, every input met by every noise: K-FAC is exact at the optimum.

    y = W* x + n with n of mean zero and covariance P^-1, so that the second moment of the gradients P n is the Hessian
    P; a LoRA update of rank 6 stands at the optimum. All in float64.
    """

    def __init__(self, seed=0, d_in=9, d_out=8, rank=6):
        generator = torch.Generator().manual_seed(seed)

        def randn(*shape):
            return torch.randn(*shape, dtype=torch.float64, generator=generator)

        root = randn(d_out, d_out) * 2.0 ** -torch.arange(d_out)
        self.p = root @ root.mT + 0.01 * torch.eye(d_out, dtype=torch.float64)
        noise = randn(40, d_out)
        noise = noise - noise.mean(0)
        covariance = noise.mT @ noise / len(noise)
        # whiten exactly, then give it the covariance P^-1
        noise = noise @ torch.linalg.inv(torch.linalg.cholesky(covariance)).mT
        noise = noise @ torch.linalg.cholesky(torch.linalg.inv(self.p)).mT
        inputs = randn(30, d_in) * 1.7 ** -torch.arange(d_in)
        self.x = inputs.repeat_interleave(len(noise), 0)
        base = nn.Linear(d_in, d_out, bias=False, dtype=torch.float64)
        self.net = dynrank.add_lora(nn.Sequential(base), rank=rank, alpha=3, target_modules=["0"], dtype=torch.float64)
        self.layer = self.net[0]
        with torch.no_grad():
            self.layer.lora_B.copy_(randn(d_out, rank))
            self.layer.lora_A.copy_(randn(rank, d_in))
            self.y = self.net(self.x) + noise.repeat(len(inputs), 1)

    def loss(self):
        e = self.net(self.x) - self.y
        return (e @ self.p * e).sum(1).mean() / 2

    def measured(self):
        window = Moments(dict(dynrank.lora_layers(self.net)), 20)
        self.loss().backward()
        window.end_step()
        window.close()
        return window

    def increase(self, lora_B, lora_A):
        """Of the loss, if these were the factors."""
        old = self.layer.lora_A.clone(), self.layer.lora_B.clone()
        with torch.no_grad():
            before = float(self.loss())
            self.layer.set_factors(lora_A, lora_B)
            after = float(self.loss())
        self.layer.set_factors(*old)
        return after - before


@pytest.mark.parametrize("rank", [1, 2, 3, 5])
def test_loss_metric_predicts_the_increase_of_the_loss(rank):
    problem = Quadratic()
    measured = problem.measured()
    (report,) = predict(problem.net, rank, how=How(metric="loss"), measured=measured)
    before = problem.loss().item()
    resize(problem.net, rank, how=How(metric="loss"), measured=measured)
    increase = problem.loss().item() - before
    # half the squared norm, times the number of examples that the loss is a mean over
    assert report.predicted_error**2 / 2 * len(problem.x) == pytest.approx(increase, rel=1e-8)
    assert increase > 0


@pytest.mark.parametrize("seed", range(3))
def test_loss_metric_ranks_truncations_as_the_loss_does(seed):
    problem = Quadratic(seed)
    measured = problem.measured()
    factors = problem.layer.lora_B, problem.layer.lora_A
    increases = {}
    for metric in ("weight", "output", "loss"):
        gram_u, gram_z = measured.of("0", metric)
        change = truncate_product(*factors, 3, gram_u=gram_u, gram_z=gram_z)
        increases[metric] = problem.increase(change.lora_B, change.lora_A)
    assert increases["loss"] < increases["output"]
    assert increases["loss"] < increases["weight"]
    with torch.no_grad():  # the worst: the last three directions instead of the first
        gram_u, gram_z = measured.of("0", "loss")
        full = truncate_product(*factors, 6, gram_u=gram_u, gram_z=gram_z)
        best = truncate_product(*factors, 3, gram_u=gram_u, gram_z=gram_z)
        product, kept = full.lora_B @ full.lora_A, best.lora_B @ best.lora_A
        rest = product - kept
        u, s, vh = torch.linalg.svd(rest, full_matrices=False)
    assert problem.increase(u[:, :3] * s[:3], vh[:3]) > 5 * increases["loss"]


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_output_metric_predicts_the_error_of_the_output(rank):
    problem = Quadratic()
    measured = problem.measured()
    (report,) = predict(problem.net, rank, how=How(metric="output"), measured=measured)
    with torch.no_grad():
        before = problem.net(problem.x)
        resize(problem.net, rank, how=How(metric="output"), measured=measured)
        error = (problem.net(problem.x) - before).square().sum(1).mean().sqrt()
    assert report.predicted_error == pytest.approx(float(error), rel=1e-8)
