"""Carried state against an optimizer that lived in the new coordinates from the start."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import dynrank
from dynrank.errors import ConfigurationError
from dynrank.linalg import grow_product
from dynrank.optim import change_state, check_optimizer

OLD, NEW, OTHER = 5, 3, 4  # the rank before and after, and the parameter's other dimension
FIRST = ("exp_avg", "momentum_buffer")
ADAMS = [
    pytest.param(torch.optim.Adam, {}, id="Adam"),
    pytest.param(torch.optim.Adam, {"amsgrad": True}, id="Adam-amsgrad"),
    pytest.param(torch.optim.AdamW, {"foreach": True}, id="AdamW-foreach"),
    pytest.param(torch.optim.AdamW, {"fused": True}, id="AdamW-fused"),
    pytest.param(torch.optim.RAdam, {}, id="RAdam"),
    pytest.param(torch.optim.NAdam, {}, id="NAdam"),
]
SGDS = [
    pytest.param(torch.optim.SGD, {"momentum": 0.9}, id="SGD"),
    pytest.param(torch.optim.SGD, {"momentum": 0.9, "dampening": 0.1, "nesterov": False}, id="SGD-dampening"),
    pytest.param(torch.optim.SGD, {"momentum": 0.9, "nesterov": True, "foreach": True}, id="SGD-nesterov"),
]


def shaped(rank, dim):
    return (rank, OTHER) if dim == 0 else (OTHER, rank)


def along(map_KR, value, dim):
    return torch.einsum("kr,ri->ki" if dim == 0 else "kr,ir->ik", map_KR, value)


def lived(cls, options, gradients):
    """An optimizer and its one parameter after steps with the given gradients."""
    parameter = nn.Parameter(torch.zeros_like(gradients[0]))
    # the decoupled or L2 decay of a parameter isn't linear in the gradient
    optimizer = cls([parameter], lr=0.1, weight_decay=0.0, **options)
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    parameter.grad = None
    return optimizer, parameter


def carried(cls, options, map_KR, dim, steps=4):
    """(old state before, state after the change, state of one that lived in the new coordinates)."""
    torch.manual_seed(0)
    gradients = [torch.randn(shaped(map_KR.shape[1], dim), dtype=torch.float64) for _ in range(steps)]
    optimizer, parameter = lived(cls, options, gradients)
    before = copy.deepcopy(optimizer.state[parameter])
    check_optimizer(optimizer, [parameter], "transport")
    change_state(optimizer, parameter, map_KR, dim, "transport")
    reference, reference_parameter = lived(cls, options, [along(map_KR, g, dim) for g in gradients])
    return before, optimizer.state[parameter], reference.state[reference_parameter]


@pytest.fixture
def truncation():
    return torch.randn(NEW, OLD, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize(("cls", "options"), ADAMS + SGDS)
def test_change_state_first_moments_are_those_of_the_new_coordinates(cls, options, dim, truncation):
    _, state, reference = carried(cls, options, truncation, dim)
    keys = [key for key in FIRST if key in reference]
    assert keys
    for key in keys:
        assert_close(state[key], reference[key])


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize(("cls", "options"), ADAMS)
def test_change_state_second_moments_move_by_the_squared_map_and_counts_stay(cls, options, dim, truncation):
    before, state, reference = carried(cls, options, truncation, dim)
    squared = [key for key in before if key.endswith("exp_avg_sq")]
    assert len(squared) == (2 if options.get("amsgrad") else 1)
    for key in squared:
        assert_close(state[key], along(truncation * truncation, before[key], dim))
    for key in set(before) - set(squared) - set(FIRST):  # step, mu_product
        assert state[key] == before[key] == reference[key]


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("axes", [[4, 0, 2], [1, 1, 3]])
def test_change_state_second_moments_are_exact_when_the_map_selects_directions(dim, axes):
    map_KR = -torch.eye(OLD, dtype=torch.float64)[axes]
    _, state, reference = carried(torch.optim.Adam, {"amsgrad": True}, map_KR, dim)
    for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
        assert_close(state[key], reference[key])


@pytest.mark.parametrize("dim", [0, 1])
def test_change_state_growth_seeds_second_moments_with_the_mean(dim):
    lora = torch.randn(9, 3), torch.randn(3, 9)
    map_KR = grow_product(*lora, 5).from_A
    before, state, _ = carried(torch.optim.Adam, {"amsgrad": True}, map_KR, dim)
    old, new = (slice(3), slice(3, 5)) if dim == 0 else ((slice(None), slice(3)), (slice(None), slice(3, 5)))
    for key in ("exp_avg_sq", "max_exp_avg_sq"):
        assert torch.equal(state[key][old], before[key])
        mean = before[key].mean(dim, keepdim=True)
        assert_close(state[key][new], mean.expand_as(state[key][new]))
    assert torch.equal(state["exp_avg"][new], torch.zeros_like(state["exp_avg"][new]))


def test_change_state_reset_forgets_one_parameter_only(truncation):
    first, second = (nn.Parameter(torch.zeros(OLD, OTHER)) for _ in range(2))
    optimizer = torch.optim.Adam([first, second])
    first.grad, second.grad = torch.ones(OLD, OTHER), torch.ones(OLD, OTHER)
    optimizer.step()
    kept = copy.deepcopy(optimizer.state[second])
    change_state(optimizer, first, truncation, 0, "reset")
    assert first not in optimizer.state
    assert all(torch.equal(optimizer.state[second][key], kept[key]) for key in kept)


def test_change_state_leaves_an_unknown_parameter_alone(truncation):
    optimizer = torch.optim.Adam([nn.Parameter(torch.zeros(OLD, OTHER))])
    change_state(optimizer, nn.Parameter(torch.zeros(OLD, OTHER)), truncation, 0, "transport")
    assert not optimizer.state


def adapted(rank=6):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(10, 12), nn.Tanh(), nn.Linear(12, 8))
    return dynrank.add_lora(net, rank=rank, target_modules=["0", "2"])


def train(net, optimizer, steps):
    data = torch.randn(16, 10, generator=torch.Generator().manual_seed(2))
    target = torch.randn(16, 8, generator=torch.Generator().manual_seed(3))
    losses = []

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(net(data), target)
        loss.backward()
        return loss

    for _ in range(steps):
        losses.append(optimizer.step(closure).item())
    return losses


@pytest.mark.parametrize("rank", [2, 8])
@pytest.mark.parametrize("state", ["transport", "reset"])
@pytest.mark.parametrize(("cls", "options"), ADAMS + SGDS)
def test_optimizer_goes_on_learning_after_a_resize(cls, options, state, rank):
    net = adapted()
    optimizer = cls([p for p in net.parameters() if p.requires_grad], lr=0.02, **options)
    train(net, optimizer, 10)
    dynrank.resize(net, rank, optimizers=[optimizer], optimizer_state=state)
    losses = train(net, optimizer, 20)
    assert losses[-1] < losses[0]
    for _, layer in dynrank.lora_layers(net):
        for parameter in (layer.lora_A, layer.lora_B):
            shapes = {v.shape for k, v in optimizer.state[parameter].items() if k not in ("step", "mu_product")}
            assert shapes == {parameter.shape}


class OwnAdam(torch.optim.Adam):
    """A user's subclass may hold anything in its state."""


REFUSED = ["RMSprop", "Adagrad", "Rprop", "LBFGS", "Adafactor"]


@pytest.mark.parametrize("cls", [*(getattr(torch.optim, name) for name in REFUSED), OwnAdam])
def test_resize_refuses_an_optimizer_without_a_rule_and_changes_nothing(cls):
    net = adapted()
    optimizer = cls([p for p in net.parameters() if p.requires_grad])
    train(net, optimizer, 2)
    tensors, state = copy.deepcopy(net.state_dict()), copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ConfigurationError, match=rf"optimizer {cls.__name__}"):
        dynrank.resize(net, 2, optimizers=[optimizer])
    assert all(torch.equal(value, tensors[key]) for key, value in net.state_dict().items())
    assert_close(optimizer.state_dict()["state"], state["state"], rtol=0, atol=0, allow_subclasses=False)


def test_lbfgs_is_refused_even_when_its_state_may_be_reset():
    net = adapted()
    optimizer = torch.optim.LBFGS([p for p in net.parameters() if p.requires_grad])
    train(net, optimizer, 2)
    with pytest.raises(ConfigurationError, match="LBFGS keeps all parameters in one vector"):
        dynrank.resize(net, 2, optimizers=[optimizer], optimizer_state="reset")
    assert torch.tensor(train(net, optimizer, 2)).isfinite().all()


@pytest.mark.parametrize("name", [name for name in REFUSED if name != "LBFGS"])
def test_optimizer_without_a_rule_goes_on_stepping_after_a_reset(name):
    net = adapted()
    optimizer = getattr(torch.optim, name)([p for p in net.parameters() if p.requires_grad])
    train(net, optimizer, 3)
    dynrank.resize(net, 2, optimizers=[optimizer], optimizer_state="reset")
    assert torch.tensor(train(net, optimizer, 5)).isfinite().all()


def test_check_optimizer_refuses_an_unknown_mode_entry_or_shape():
    parameter = nn.Parameter(torch.zeros(2, 3))
    optimizer = torch.optim.Adam([parameter])
    with pytest.raises(ConfigurationError, match=r"optimizer_state must be one of .* got 'keep'"):
        check_optimizer(optimizer, [parameter], "keep")
    optimizer.state[parameter] = {"exp_avg": torch.zeros(3, 2)}
    with pytest.raises(ConfigurationError, match=r"'exp_avg' of optimizer Adam has shape \[3, 2\]"):
        check_optimizer(optimizer, [parameter], "transport")
    optimizer.state[parameter] = {"exp_avg": torch.zeros(2, 3), "hessian": torch.zeros(2, 3)}
    with pytest.raises(ConfigurationError, match="no rule carries 'hessian'"):
        check_optimizer(optimizer, [parameter], "transport")
