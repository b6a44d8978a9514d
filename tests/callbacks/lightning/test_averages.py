"""Averages of the weights through changes of rank, against averages formed here, in float64, from every step."""

from dataclasses import replace

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.testing import assert_close

import dynrank
from dynrank.callbacks import AdapterCheckpoint, RankScheduler
from dynrank.errors import ConfigurationError
from dynrank.schedules import How, Stage
from dynrank.targets import GrowTo, Rank
from dynrank.triggers import At

DECAY = 0.9
FACTORS = [f"net.{index}.lora_{factor}" for index in (0, 2) for factor in "BA"]
SHRINK_AND_GROW = [Stage(At(step=8), Rank(3)), Stage(At(step=16), GrowTo(5))]


def scheduler(stages=SHRINK_AND_GROW, **how):
    return RankScheduler([replace(stage, how=How(**how)) for stage in stages])


class Weights(lightning.Callback):
    """The weights after every step, and on both sides of every change."""

    def __init__(self):
        self.steps = {}
        self.starts = {}
        self.changes = {}

    def on_train_epoch_start(self, trainer, pl_module):
        self.starts[trainer.global_step] = self.now(pl_module)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.steps[trainer.global_step] = self.now(pl_module)

    def on_rank_change(self, trainer, pl_module, event):
        self.changes[event.step] = self.steps.get(event.step), self.now(pl_module)

    def now(self, module):
        return {name: module.get_parameter(name).detach().double().clone() for name in FACTORS}


def moved(average, before, after):
    """The average in new coordinates; the maps are solved for, from the weights on both sides of the change."""
    result = {}
    for name, value in average.items():
        old = before[name]
        new = after[name]
        if name.endswith("A"):
            kept = min(len(old), len(new))
            maps = torch.linalg.lstsq(old.mT, new[:kept].mT).solution.mT
            # A new row counts as if it had always been there.
            result[name] = torch.cat([maps @ value, new[kept:]])
        else:
            maps = torch.linalg.lstsq(old, new).solution
            result[name] = value @ maps
    return result


def blend(average, weights, share):
    return {name: average[name] + share * (weights[name] - average[name]) for name in average}


@pytest.mark.parametrize("order", [1, -1])
def test_exponential_average_is_that_of_a_run_in_the_new_coordinates(fit, order):
    weights = Weights()
    pair = [EMAWeightAveraging(decay=DECAY), scheduler()]
    module, _ = fit(*pair[::order], weights)
    expected = None
    for step in sorted(weights.steps):
        if step - 1 in weights.changes:
            expected = moved(expected, *weights.changes[step - 1])
        now = weights.steps[step]
        expected = now if expected is None else blend(expected, now, 1 - DECAY)
    assert [layer.rank for _, layer in dynrank.lora_layers(module)] == [5, 5]
    result = weights.now(module)
    for name in FACTORS:
        assert_close(result[name], expected[name], rtol=1e-4, atol=1e-5)
        assert not torch.allclose(result[name], weights.steps[24][name], atol=1e-3)


def test_stochastic_average_is_that_of_a_run_in_the_new_coordinates(fit):
    weights = Weights()
    pair = [StochasticWeightAveraging(1e-2, swa_epoch_start=1), scheduler([Stage(At(step=25), Rank(3))])]
    # Lightning warns so of the learning rate's schedule.
    with pytest.warns(UserWarning, match="only supported every epoch"):
        module, _ = fit(*pair, weights, max_epochs=4, max_steps=-1)
    expected = None
    for count, start in enumerate(sorted(weights.starts)):
        # The change at 25 lies between the starts at 20 and 30.
        if expected is not None and start == 30:
            expected = moved(expected, *weights.changes[25])
        expected = weights.starts[start] if count == 0 else blend(expected, weights.starts[start], 1 / (count + 1))
    for name in FACTORS:
        assert_close(weights.now(module)[name], expected[name], rtol=1e-4, atol=1e-5)


def test_change_at_the_end_is_the_best_approximation_of_the_average(fit):
    weights = Weights()
    pair = [scheduler([Stage(At(fraction=1.0), Rank(2))]), EMAWeightAveraging(decay=DECAY)]
    module, _ = fit(*pair, weights)
    average = None
    for step in sorted(weights.steps):
        average = weights.steps[step] if average is None else blend(average, weights.steps[step], 1 - DECAY)
    for name, layer in dynrank.lora_layers(module):
        old = layer.scaling * average[f"{name}.lora_B"] @ average[f"{name}.lora_A"]
        lost = (old - layer.delta_weight().double()).norm()
        assert_close(lost, torch.linalg.svdvals(old)[2:].norm(), rtol=1e-4, atol=1e-6)


def of_peft(module_class):
    """The module with a model of PEFT's."""
    module = module_class()
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 24), nn.Tanh(), nn.Linear(24, 6))
    module.net = get_peft_model(net, LoraConfig(r=6, target_modules=["0", "2"]))
    return module


# Each has the order of the average and the scheduler, what saves them, and whose model it is.
RESUMED = {
    "after": (-1, ModelCheckpoint, lambda cls: cls()),
    "before, without the base": (1, AdapterCheckpoint, lambda cls: cls()),
    "after, without the base": (-1, AdapterCheckpoint, lambda cls: cls()),
    "before, of PEFT": (1, ModelCheckpoint, of_peft),
}


@pytest.mark.parametrize("name", RESUMED)
def test_resumed_run_ends_with_the_same_average_to_the_bit(regression, fit, assert_same, tmp_path, name):
    order, kind, make = RESUMED[name]

    def run(**options):
        pair = [EMAWeightAveraging(decay=DECAY), scheduler()][::order]
        return fit(*pair, module=make(regression[0]), saved=tmp_path, kind=kind, **options)[0]

    whole = run()
    # The starts are at the first change, and between two.
    for start in (8, 12):
        assert_same(run(ckpt_path=tmp_path / f"step={start}.ckpt"), whole, start)


def test_undone_change_leaves_the_average_as_if_it_had_not_been_tried(regression, fit, assert_same):
    class Worse(regression[0]):
        """Each validation is worse than the one before."""

        loss = 0.0

        def validation_step(self, batch, batch_idx):
            self.loss += 1.0
            self.log("val/loss", self.loss)

    plain, _ = fit(EMAWeightAveraging(decay=DECAY), RankScheduler([]))
    refusing = scheduler([Stage(At(step=12), Rank(1))], max_regression=0.0)
    module, _ = fit(refusing, EMAWeightAveraging(decay=DECAY), module=Worse())
    assert [event.undone for event in refusing.history] == [True]
    assert_same(module, plain)


def test_resize_moves_an_averaged_model_and_refuses_a_foreign_one():
    torch.manual_seed(0)
    model = dynrank.add_lora(nn.Sequential(nn.Linear(9, 8)), rank=4)
    nn.init.normal_(model[0].lora_B)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    nn.init.normal_(average.module[0].lora_B)
    b_OR, a_RI, mean_B, mean_A = (
        factor.detach().double().clone() for m in (model, average.module) for factor in (m[0].lora_B, m[0].lora_A)
    )
    dynrank.resize(model, 2, averages=[average])
    # between the averages stands the projection of the rank's space that takes b a to its best rank 2, found densely
    u_OK = torch.linalg.svd(b_OR @ a_RI).U[:, :2]
    kept = mean_B @ torch.linalg.pinv(b_OR) @ u_OK @ u_OK.mT @ b_OR @ mean_A
    own = average.module[0]
    assert_close(own.lora_B.double() @ own.lora_A.double(), kept, rtol=1e-4, atol=1e-5)
    with pytest.raises(ConfigurationError, match=r"\['0'\] differ.*\(averages\)"):
        dynrank.resize(model, 1, averages=[dynrank.add_lora(nn.Sequential(nn.Linear(9, 8)), rank=3)])
    assert model[0].rank == 2
