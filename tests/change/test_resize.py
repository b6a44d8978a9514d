"""A change of rank in a live model: all or nothing, and nothing else moves."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import dynrank
from dynrank.change.resize import resize
from dynrank.errors import ConfigurationError
from dynrank.schedules import How

SHAPES = {"0": (12, 10), "2": (12, 12), "4": (8, 12)}


def train(net, optimizer, steps, schedule=None):
    data = torch.randn(16, 10, generator=torch.Generator().manual_seed(2))
    for _ in range(steps):
        optimizer.zero_grad()
        net(data).square().mean().backward()
        nn.utils.clip_grad_norm_([p for p in net.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        if schedule is not None:
            schedule.step()


@pytest.fixture
def trained():
    """(net of three LoRA layers of rank 6 with alpha 9, AdamW that has made some steps)."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(10, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 8))
    dynrank.add_lora(net, rank=6, alpha=9, target_modules=list(SHAPES))
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2)
    train(net, optimizer, 5)
    return net, optimizer


def snapshot(net, optimizer):
    return copy.deepcopy(net.state_dict()), copy.deepcopy(optimizer.state_dict())


def assert_unchanged(net, optimizer, before):
    tensors, state = before
    for key, value in net.state_dict().items():
        assert torch.equal(value.nan_to_num(7.0), tensors[key].nan_to_num(7.0)), key
    assert_close(optimizer.state_dict(), state, rtol=0, atol=0)


@pytest.mark.parametrize("target", [3, 8])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
def test_resize_names_the_diverged_layer_and_changes_nothing(trained, target, value, factor):
    net, optimizer = trained
    with torch.no_grad():
        getattr(net[4], factor)[0, 0] = value
    before = snapshot(net, optimizer)
    with pytest.raises(
        ConfigurationError, match=rf"'4': {factor} must be finite.*nothing has been changed.*optimizer.lr"
    ):
        resize(net, target, optimizers=[optimizer])
    assert_unchanged(net, optimizer, before)


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        ({"0": 3, "9": 3, "zero": 3}, {}, r"(?s)named '9'.*named 'zero'"),
        ({"0": 11, "4": 0}, {}, r"(?s)'0': rank must be between 1 and min\(d_in, d_out\) = 10, got 11.*'4'.*got 0"),
        (9, {}, r"'4': rank must be .* = 8, got 9"),
        (-1, {}, "got -1"),
        ({"0": 2.5}, {}, "rank"),
        (3, {"how": How(metric="gates")}, r"metric=gates needs what the loss says.*schedule\.metric"),
    ],
)
def test_resize_refuses_what_cannot_be_done_and_changes_nothing(trained, target, options, message):
    net, optimizer = trained
    before = snapshot(net, optimizer)
    with pytest.raises(ConfigurationError, match=message):
        resize(net, target, optimizers=[optimizer], **options)
    assert_unchanged(net, optimizer, before)


def test_resize_refuses_a_merged_layer_and_a_model_without_layers(trained):
    net, optimizer = trained
    net[2].merge()
    factors = [net[0].lora_A.clone(), net[2].lora_A.clone()]
    with pytest.raises(RuntimeError, match="'2' is merged"):
        resize(net, 3, optimizers=[optimizer])
    assert torch.equal(net[0].lora_A, factors[0])
    assert torch.equal(net[2].lora_A, factors[1])
    with pytest.raises(ConfigurationError, match="no LoRA layers"):
        resize(nn.Sequential(nn.Linear(2, 2)), 1)


def test_resize_changes_only_the_layers_of_a_mapping(trained):
    net, optimizer = trained
    before = copy.deepcopy(net.state_dict())
    reports = resize(net, {"4": 2, "0": 7, "2": 6}, optimizers=[optimizer])
    assert [(r.layer, r.rank_before, r.rank_after) for r in reports] == [("0", 6, 7), ("4", 6, 2)]  # model order
    assert [layer.rank for _, layer in dynrank.lora_layers(net)] == [7, 6, 2]
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items() if key.startswith("2."))


@pytest.mark.parametrize("target", [1, 4, 8])
def test_resize_update_is_the_best_of_its_rank_and_the_report_says_so(trained, target):
    net, _ = trained
    dense = {name: layer.delta_weight().detach().double() for name, layer in dynrank.lora_layers(net)}
    for report in resize(net, target):
        u, s, vh = torch.linalg.svd(dense[report.layer], full_matrices=False)
        after = dict(dynrank.lora_layers(net))[report.layer].delta_weight().detach().double()
        # the factors are float32: 1e-6 of the update's largest singular value
        atol = 1e-6 * float(s[0])
        assert_close(after, u[:, :target] * s[:target] @ vh[:target], rtol=0, atol=atol)
        assert report.predicted_error == pytest.approx(float((dense[report.layer] - after).norm()), abs=atol)
        assert report.singular_values == pytest.approx(s[:6].tolist(), abs=atol)
        kept = s[:target].square().sum() / s.square().sum()
        assert report.energy_kept == pytest.approx(float(kept), abs=1e-6)
        assert report.parameters_saved == (6 - target) * sum(SHAPES[report.layer])


def test_resize_keeps_scaling_so_alpha_follows_the_rank(trained):
    net, _ = trained
    for rank in (4, 1, 7):
        resize(net, rank)
        for _, layer in dynrank.lora_layers(net):
            assert layer.scaling == 1.5
            assert layer.alpha == 1.5 * rank


def test_resize_growth_leaves_the_output_as_it_is(trained):
    net, _ = trained
    x = torch.randn(5, 10)
    y = net(x)
    reports = resize(net, 8)
    # float32 sums in another order
    assert_close(net(x), y, rtol=1e-6, atol=1e-6)
    assert {report.predicted_error for report in reports} == {0.0}
    assert {report.energy_kept for report in reports} == {1.0}


@pytest.mark.parametrize("rank", [3, 8])
def test_resize_keeps_parameters_groups_and_everything_that_holds_them(trained, rank):
    net, optimizer = trained
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    ids = [id(parameter) for parameter in net.parameters()]
    group = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
    members = [id(parameter) for parameter in optimizer.param_groups[0]["params"]]
    resize(net, rank, optimizers=[optimizer])
    assert [id(parameter) for parameter in net.parameters()] == ids
    assert [id(parameter) for parameter in optimizer.param_groups[0]["params"]] == members
    assert {key: value for key, value in optimizer.param_groups[0].items() if key != "params"} == group
    assert all(parameter.grad is None for parameter in net.parameters())

    factors = [net[4].lora_A.clone(), net[4].lora_B.clone()]
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(torch.optim.SGD([torch.zeros(1)], lr=1e-2), 20)
    train(net, optimizer, 3, schedule)  # clips the gradients, too
    for _ in range(3):
        reference.optimizer.step()
        reference.step()
    assert schedule.get_last_lr() == reference.get_last_lr()
    assert not torch.equal(net[4].lora_A, factors[0])
    assert not torch.equal(net[4].lora_B, factors[1])


@pytest.mark.parametrize("rank", [3, 8])
def test_resize_optimizer_state_moves_by_the_maps_between_the_factors(trained, rank):
    """The maps are found here by least squares on the factors, not taken from the code."""
    net, optimizer = trained
    layer = net[2]
    old_A, old_B = layer.lora_A.detach().double(), layer.lora_B.detach().double()
    old = copy.deepcopy([optimizer.state[layer.lora_A], optimizer.state[layer.lora_B]])
    resize(net, rank, optimizers=[optimizer])
    from_A = torch.linalg.lstsq(old_A.mT, layer.lora_A.detach().double().mT).solution.mT[: min(rank, 6)]
    from_B = torch.linalg.lstsq(old_B, layer.lora_B.detach().double()).solution[:, : min(rank, 6)]
    new_A, new_B = optimizer.state[layer.lora_A], optimizer.state[layer.lora_B]
    # float32 factors of a condition number of about 1e3 leave 1e-3 in the maps
    kept = slice(min(rank, 6))
    for maps, key in ((torch.Tensor.double, "exp_avg"), (torch.square, "exp_avg_sq")):
        expected = maps(from_B).mT @ old[0][key].double()
        assert_close(new_A[key][kept].double(), expected, rtol=0, atol=1e-3 * float(expected.abs().max()))
        expected = old[1][key].double() @ maps(from_A).mT
        assert_close(new_B[key][:, kept].double(), expected, rtol=0, atol=1e-3 * float(expected.abs().max()))
    assert new_A["step"] == new_B["step"] == 5


def test_resize_serves_every_optimizer_given():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(10, 12), nn.Linear(12, 8))
    dynrank.add_lora(net, rank=6, target_modules=["0", "1"])
    pairs = [[layer.lora_A, layer.lora_B] for _, layer in dynrank.lora_layers(net)]
    optimizers = [torch.optim.Adam(pairs[0]), torch.optim.SGD(pairs[1], lr=0.1, momentum=0.9)]
    for optimizer in optimizers * 2:
        net(torch.ones(3, 10)).square().mean().backward()
        optimizer.step()
    resize(net, 3, optimizers=iter(optimizers))
    assert optimizers[0].state[pairs[0][0]]["exp_avg"].shape == (3, 10)
    assert optimizers[1].state[pairs[1][1]]["momentum_buffer"].shape == (8, 3)
