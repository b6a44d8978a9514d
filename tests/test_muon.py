"""Muon and AdamW in one, against torch's two optimizers and exact singular vectors."""

from copy import deepcopy

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor
from torch.testing import assert_close

from dynrank.app.tasks.optimizers import make_optimizer
from dynrank.driver.learning_rates import LearningRates
from dynrank.errors import ConfigurationError
from dynrank.muon import Muon, near_polar_factor


def parameters(*shapes):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def steps(count, trained, *optimizers):
    """Steps with random gradients, alike at every call; returns how far they have moved the parameters."""
    generator = torch.Generator().manual_seed(1)
    start = deepcopy(trained)
    for _ in range(count):
        for parameter in trained:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        for optimizer in optimizers:
            optimizer.step()
    return [(now - before).detach() for now, before in zip(trained, start, strict=True)]


def test_matrices_step_as_torchs_muon_and_all_else_as_its_adamw():
    """Torch iterates in bfloat16, so that an element of the step is off by a few hundredths."""
    ours = parameters((4, 12), (12, 4), (4, 12), (5, 5), (1, 9), (7,), (3, 6), (3,))
    values = {"name": "dynrank.Muon", "lr": 0.01, "head_lr": 0.1, "weight_decay": 0.1, "warmup_steps": 0}
    values |= {"decay": "constant_with_warmup", "decay_share": 0.0, "options": {}}
    made = make_optimizer(ours[:6], ours[6:], 100, **values)["optimizer"]
    twins = deepcopy(ours)
    muon = torch.optim.Muon(twins[:5], lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW([{"params": [twins[5]]}, {"params": twins[6:], "lr": 0.1}], lr=0.01, weight_decay=0.1)
    moved = steps(6, ours, made)
    expected = steps(6, twins, muon, adamw)
    for mine, other in zip(moved[:5], expected[:5], strict=True):
        assert (mine - other).norm() < 0.03 * other.norm()
    for mine, other in zip(moved[5:], expected[5:], strict=True):
        assert_close(mine, other, rtol=0, atol=0)
    for parameter, twin in zip(ours[:5], twins[:5], strict=True):
        assert_close(made.state[parameter], dict(muon.state[twin]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("smallest", [0.3, 1e-2, 1e-6, 0.0])
def test_near_polar_factor_has_the_singular_vectors_and_almost_equal_values(smallest, dtype):
    generator = torch.Generator().manual_seed(0)
    u, _, vh = torch.linalg.svd(torch.randn(7, 8, 40, dtype=torch.float64, generator=generator), full_matrices=False)
    values = torch.linspace(1, 0, 8, dtype=torch.float64)[:, None] ** 2 * (1 - smallest) + smallest
    near = near_polar_factor((3e3 * u @ (values * vh)).to(dtype))
    x = values / values.norm()
    # torch.optim.Muon says that it does this to each singular value.
    for _ in range(5):
        x = 3.4445 * x - 4.7750 * x**3 + 2.0315 * x**5
    assert_close(near.double(), u @ (x * vh), rtol=0, atol=1e-3 if dtype == torch.float32 else 1e-6)
    large = values[:, 0] > 0.01
    assert (torch.linalg.svdvals(near)[:, large] - 1).abs().max() < 0.35


def test_matrices_of_one_shape_step_as_one_batch_however_they_lie(monkeypatch):
    seen = []

    def counted(batch):
        seen.append(tuple(batch.shape))
        return near_polar_factor(batch)

    monkeypatch.setattr("dynrank.muon.near_polar_factor", counted)
    factors = parameters(*[(4, 8), (8, 4), (4, 8), (12, 4)] * 8)
    steps(1, factors, Muon(factors))
    assert sorted(seen) == [(8, 4, 12), (24, 4, 8)]


def test_it_is_one_optimizer_to_hooks_rates_and_closures():
    factor, head = parameters((2, 8), (2, 8))
    optimizer = Muon([{"params": [factor]}, {"params": [head], "lr": 0.1, "use_muon": False}], lr=0.01)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(1))
    twins, twin = deepcopy(([factor, head], optimizer))
    plain = steps(1, [factor, head], optimizer)
    LearningRates(twin, [twins[0]], 3.0)
    tripled = steps(1, twins, twin)
    assert_close(tripled, [3 * plain[0], plain[1]])
    assert optimizer.step(lambda: head.sum().backward() or 5.0) == 5.0
    assert len(seen) == 2


def test_it_goes_on_from_its_state_to_the_same_bits():
    def groups(factors, head):
        return [{"params": factors}, {"params": [head], "lr": 0.1, "use_muon": False}]

    *factors, head = mine = parameters((3, 8), (8, 3), (2, 8))
    optimizer = Muon(groups(factors, head), lr=0.01)
    steps(3, mine, optimizer)
    *factors, head = twins = deepcopy(mine)
    twin = Muon(groups(factors, head), lr=0.01)
    twin.load_state_dict(deepcopy(optimizer.state_dict()))
    assert_close(steps(3, twins, twin), steps(3, mine, optimizer), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"momentum": 1.0}, "momentum must be less than 1, got 1.0"),
        ({"lr": -1.0}, "lr must be greater than or equal to 0"),
        ({"nesterov": True}, "nesterov is unknown"),
    ],
)
def test_unusable_values_are_refused(values, message):
    with pytest.raises(ConfigurationError, match=message):
        Muon(parameters((2, 3)), **values)


def test_sharded_matrices_are_refused():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        sharded = nn.Parameter(distribute_tensor(torch.ones(4, 6), init_device_mesh("cpu", (1,))))
        with pytest.raises(ConfigurationError, match=r"sharded by FSDP2.*shard_frozen.*use_muon=False"):
            Muon([sharded])
        Muon([{"params": [sharded], "use_muon": False}])
    finally:
        distributed.destroy_process_group()
