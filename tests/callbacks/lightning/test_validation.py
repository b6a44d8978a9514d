"""Validations for a change under Lightning: they find what Lightning does, and the run does not notice."""

import csv
import math
from contextlib import nullcontext

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import CombinedLoader
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics import MaxMetric, MeanMetric

import dynrank
from dynrank.callbacks import RankScheduler
from dynrank.callbacks.lightning import validation
from dynrank.errors import ConfigurationError
from dynrank.schedules import How, Stage, auto
from dynrank.targets import Rank
from dynrank.triggers import At, Plateau

pytestmark = pytest.mark.filterwarnings("ignore")


def train(regression, make, loaders, *callbacks, **options):
    """Train for 20 steps; without ``loaders`` for validations the module has them."""
    _, data, trainer = regression
    trainer(callbacks=[*callbacks], max_steps=20, **options).fit(make(), data()[0], loaders)


@pytest.mark.parametrize("several", [False, True])
def test_metrics_of_a_validation_for_a_change_are_those_that_lightning_has(regression, several):
    """Of hooks and steps with all their arguments, or with as few as Lightning allows."""
    make, data, _ = regression

    class Few(make):
        def __init__(self):
            super().__init__()
            self.means = nn.ModuleList([MeanMetric(), MeanMetric()])

        def val_dataloader(self):
            # As those that Lightning makes anew in each epoch.
            x, y = data()[1].dataset.tensors
            x = x + self.trainer.current_epoch
            batches = [[*zip(x.split(sizes), y.split(sizes), strict=True)] for sizes in ([10, 30, 40], [50, 5, 25])]
            loaders = [DataLoader(each, batch_size=None) for each in batches]
            return loaders if several else loaders[0]

        def on_validation_epoch_start(self):
            self.calls = 0

        def on_validation_batch_start(self, batch, batch_idx):
            self.calls += 1 + batch_idx

        def validation_step(self, batch):
            self.judge(batch, 0)

        def judge(self, batch, loader):
            errors = (self.net(batch[0]) - batch[1]).square()
            self.means[loader].update(errors)
            self.log("val/mean", self.means[loader])
            self.log("val/loss", errors.mean())
            self.log("val/float", errors.mean().item(), batch_size=1)
            self.log("val/nan", float("nan") if self.calls == 1 else 1.0)
            self.log_dict({"val/most": errors.max(), "val/mode": float(self.training)}, reduce_fx="max")
            self.log("val/sum", errors.sum(), reduce_fx=torch.sum)

        def on_validation_epoch_end(self):
            self.log("val/calls", float(self.calls))

    class All(Few):
        def on_validation_batch_start(self, batch, batch_idx, dataloader_idx):
            self.calls += 1 + batch_idx + dataloader_idx

        def validation_step(self, batch, batch_idx, dataloader_idx):
            self.judge(batch, dataloader_idx)

    class Comparing(Callback):
        def on_validation_end(self, trainer, pl_module):
            self.expected = dict(trainer.callback_metrics)

        def on_train_epoch_end(self, trainer, pl_module):
            self.found = validation.validate(trainer, pl_module)

    comparing = Comparing()
    options = {"limit_val_batches": 2, "reload_dataloaders_every_n_epochs": 1}
    train(regression, All if several else Few, None, comparing, **options)
    assert len(comparing.expected) == (15 if several else 8)
    torch.testing.assert_close(comparing.found, comparing.expected, check_dtype=False, equal_nan=True)


@pytest.mark.parametrize(
    ("without", "most"),
    [([], 0.0), ([Stage(At(step=3), Rank(1))], math.inf)],
    ids=["undone", "cut"],
)
def test_a_run_is_as_it_were_without_validations_for_a_change(fit, regression, tmp_path, without, most):
    """Also where its module keeps scores, which asks whether a validation is one for a change."""

    class Keeping(regression[0]):
        def __init__(self):
            super().__init__()
            self.best = MaxMetric()

        def on_validation_epoch_end(self):
            self.log("val/own", torch.rand(()))
            if not dynrank.validating_change():
                self.best.update(torch.rand(()))
                self.log("val/best", self.best.compute())

    class Recording(Callback):
        found = []

        def record(self, trainer, pl_module, *_):
            metrics = [{k: float(v) for k, v in m.items()} for m in (trainer.callback_metrics, trainer.logged_metrics)]
            progress = trainer.fit_loop.epoch_loop.val_loop.batch_progress.state_dict()
            modes = [part.training for part in pl_module.modules()]
            weights = [p.tolist() for p in pl_module.parameters()]
            self.found.append([trainer.global_step, str(trainer.state.stage), metrics, progress, modes, weights])

        on_train_batch_start = on_validation_start = on_validation_end = record

    runs = []
    # No validation comes before the change: Lightning has not made the loaders.
    options = {"check_val_every_n_epoch": 2, "log_every_n_steps": 1}
    judged = [Stage(At(step=3), Rank(1), how=How(max_regression=most))]
    for name, scheduler in (("without", RankScheduler(without)), ("with", RankScheduler(judged))):
        Recording.found = []
        logger = CSVLogger(tmp_path / name)
        fit(scheduler, Recording(), module=Keeping(), logger=logger, **options)
        with open(f"{logger.log_dir}/metrics.csv") as file:
            runs.append([*Recording.found, *csv.DictReader(file)])
    (event,) = scheduler.history
    assert (event.undone, event.measured is None) == (most == 0, False)
    assert runs[0] == runs[1]


SCORED = How(max_regression=math.inf, check_monitor="val/score")


class Scoring(Callback):
    def on_validation_epoch_end(self, trainer, pl_module):
        pl_module.log("val/score", 0.5)


@pytest.mark.parametrize(
    ("schedule", "said", "step"),
    [
        (Stage(Plateau("val/los"), Rank(1)), "Plateau must.*'val/los'; logged: 'train/loss', 'val/", 0),
        (auto(how=How(check_monitor="val/los")), "check_monitor of How.*'val/los'; logged: 'val/loss'\\.", 10),
        # What a callback logs is in no validation for a change, but a trigger reads it.
        (Stage(At(step=5), Rank(1), how=SCORED), "'val/score'; logged: 'val/loss'.*evaluate=", 5),
        (Stage(Plateau("val/score"), Rank(1), deadline=0.75), None, 20),
    ],
)
def test_a_metric_that_no_validation_logs_is_refused_at_the_first_one(regression, schedule, said, step):
    """A trigger's in Lightning's check before training."""
    make, data, trainer = regression
    made = trainer(callbacks=[RankScheduler(schedule), Scoring()], max_steps=20)
    with nullcontext() if said is None else pytest.raises(ConfigurationError, match=said):
        made.fit(make(), *data())
    assert made.global_step == step


def test_loaders_that_are_read_together_need_a_function_that_evaluates(regression):
    make, data, _ = regression

    class Combined(make):
        def validation_step(self, batch, batch_idx):
            super().validation_step(batch[0], batch_idx)

    loader = CombinedLoader([data()[1]] * 2, "max_size_cycle")
    stage = Stage(At(step=6), Rank(1), how=How(max_regression=0.1))
    with pytest.raises(ConfigurationError, match=r"in sequential loaders, or RankScheduler\(…, evaluate=…\)"):
        train(regression, Combined, loader, RankScheduler(stage))
    scheduler = RankScheduler(stage, evaluate=lambda: {"val/loss": 1.0})
    train(regression, Combined, loader, scheduler)
    assert str(scheduler.history[0].measured) == "val/loss 1 → 1"
