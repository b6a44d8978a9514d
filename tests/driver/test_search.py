"""How few directions are enough: against trying all numbers of them, and against an update whose rank is known."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from trained import drive

import dynrank
from dynrank.change import directions
from dynrank.driver.training import Training
from dynrank.schedules import How, Stage, auto
from dynrank.targets import Budget
from dynrank.triggers import At

FULL = 8
SPECTRA = {"0": [9.0, 4.0, 1.0], "1": [2.0]}


def smallest(tolerance, mode="min", **bounds):
    """The search alone, without the cut before it."""
    how = How(max_regression=tolerance, check_mode=mode)
    return Stage(At(fraction=1.0), Budget(share=1.0, by="weight", **bounds), how=how, search=True)


class Planted(Training):
    """Two layers whose updates of rank 3 and 1 are what the data need, in factors of rank 8; nothing moves any more."""

    def __init__(self, spectra=SPECTRA, metric=None):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(12, 20), nn.Linear(20, 10))
        model = dynrank.add_lora(net, rank=FULL, alpha=FULL, target_modules=list(spectra))
        for name, layer in dynrank.lora_layers(model):
            values = torch.tensor(spectra[name])
            sizes = (layer.d_out, layer.d_in, FULL)
            left, right, mix = (torch.linalg.qr(torch.randn(size, len(values))).Q for size in sizes)
            layer.lora_B.data.copy_(left * values @ mix.mT)
            layer.lora_A.data.copy_(mix @ right.mT)
        self.x = torch.randn(200, 12)
        with torch.no_grad():
            self.y = model(self.x) + torch.randn(200, 10)
        super().__init__(model, [torch.optim.SGD(dynrank.adapter_parameters(model), lr=0.0)])
        self.metric = metric
        self.validations = 0

    def loss(self):
        return nn.functional.mse_loss(self.model(self.x), self.y)

    @torch.no_grad()
    def validate(self):
        self.validations += 1
        loss = self.loss().item()
        return {"val/loss": loss if self.metric is None else self.metric(self.validations, loss)}

    @property
    def ranks(self):
        return {name: layer.rank for name, layer in dynrank.lora_layers(self.model)}


def searched(schedule, metric=None):
    training = Planted(metric=metric)
    return training, drive(schedule, training, 4, training.loss).history


def dense_losses(training):
    """The loss of every number of directions, the largest squares per parameter kept first, by dense float64."""
    layers = dict(dynrank.lora_layers(training.model))
    parts = {n: torch.linalg.svd(la.delta_weight().detach().double(), full_matrices=False) for n, la in layers.items()}
    worth = [(float(parts[n].S[i]) ** 2 / (la.d_out + la.d_in), n) for n, la in layers.items() for i in range(1, FULL)]
    kept = dict.fromkeys(layers, 1)
    for name in [None, *(name for _, name in sorted(worth, reverse=True))]:
        if name is not None:
            kept[name] += 1
        x = training.x.double()
        for (key, layer), (u, s, vh) in zip(layers.items(), parts.values(), strict=True):
            update = u[:, : kept[key]] * s[: kept[key]] @ vh[: kept[key]]
            x = x @ (layer.base.weight.double() + update).mT + layer.base.bias.double()
        yield dict(kept), float((x - training.y).square().mean())


@pytest.mark.parametrize("tolerance", [0.001, 0.1, 0.6])
def test_cut_is_the_smallest_that_trying_all_numbers_finds(tolerance):
    fresh = Planted()
    before = fresh.validate()["val/loss"]
    most = before * (1 + tolerance)
    expected = next(ranks for ranks, loss in dense_losses(fresh) if loss <= most)
    training, (made,) = searched(smallest(tolerance))
    assert training.ranks == expected
    # The uncut model, and log2 of 15 numbers.
    assert training.validations <= 1 + 4 + 1
    after = training.validate()["val/loss"]
    assert after <= most * (1 + 1e-6)
    assert (made.measured.before, made.measured.after) == pytest.approx((before, after))
    assert made.reason == f"fraction 1: {sum(expected.values())} of 16 directions, {tolerance:.2%} allowed"


@pytest.mark.parametrize(
    "schedule",
    [smallest(0.1), auto(0.1, share=0.9, at=0.5, how=How()), Stage(At(step=2), Budget(share=0.5, by="weight"))],
)
def test_each_layer_is_decomposed_once_for_a_stage_that_is_due(schedule, monkeypatch):
    """Though each trial changes the factors, and its undoing restores them."""
    decomposed = []
    original = directions.directions_of
    monkeypatch.setattr(directions, "directions_of", lambda *pair: decomposed.append(pair) or original(*pair))
    training, history = searched(schedule)
    assert training.validations > 3 or history[0].step == 2
    assert len(decomposed) == 2 * len(history) > 0


def test_auto_cuts_to_a_share_without_a_trial_then_within_its_tolerance():
    training, (first, last) = searched(auto(0.005, share=0.5, at=0.5, how=How()))
    assert (first.step, last.step) == (2, 4)
    assert first.reason == "fraction 0.5"
    # Nothing moves, so no layer has any importance, and ranks fall alike, to what the first layer needs.
    assert training.ranks == {"0": 3, "1": 2}


def test_a_layer_without_importance_is_cut_within_the_tolerance_alone():
    training = Planted({name: [2.0, 2.0, 2.0] for name in SPECTRA})
    layers = [layer for _, layer in dynrank.lora_layers(training.model)]
    # The second layer does not move.
    groups = [{"params": [la.lora_A, la.lora_B], "lr": rate} for la, rate in zip(layers, (1e-4, 0.0), strict=True)]
    training.optimizers = [torch.optim.SGD(groups)]
    search = Stage(At(fraction=1.0), Budget(share=1.0), how=How(max_regression=0.005), search=True)
    (event,) = drive(search, training, 4, training.loss).history
    assert (event.undone, training.ranks["1"]) == (True, FULL)


def test_a_limit_of_the_budget_holds_whatever_it_costs():
    training, (made,) = searched(smallest(1e-9, highest=2))
    assert (training.ranks, made.undone) == ({"0": 2, "1": 2}, False)
    training, history = searched(smallest(0.1, lowest=FULL))
    assert (history, training.validations) == ([], 0)


def interrupted(number, loss):
    if number == 4:
        raise KeyboardInterrupt
    return loss


@pytest.mark.parametrize(
    "metric",
    [
        lambda number, loss: loss if number == 1 else float("nan"),
        lambda number, loss: float("inf") if number == 1 else loss,
        None,
        interrupted,
    ],
    ids=["cuts diverge", "had diverged", "all are needed", "interrupted"],
)
def test_weights_stay_to_the_bit_where_nothing_can_be_spared_and_the_history_says_so(metric):
    training = Planted({name: [3.0] * FULL for name in SPECTRA}, metric)
    before = {name: value.clone() for name, value in training.model.state_dict().items()}
    with pytest.raises(KeyboardInterrupt) if metric is interrupted else nullcontext():
        (event,) = drive(smallest(0.01), training, 4, training.loss).history
        assert event.undone
        assert [layer.rank_before - layer.rank_after for layer in event.layers] == [1, 0]
        assert event.reason.startswith("fraction 1: 15 of 16 directions")
    for name, value in training.model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_larger_is_better_where_the_mode_says_so():
    training, _ = searched(smallest(0.0005, "max"), lambda _, loss: -10 - loss)
    assert training.ranks == {"0": 3, "1": 1}
