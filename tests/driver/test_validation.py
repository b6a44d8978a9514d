"""A validation for a change leaves no trace in the program that is validated."""

import csv
from collections import Counter, deque

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import CombinedLoader
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics import CatMetric, MaxMetric, MeanMetric, MetricCollection

from dynrank.callbacks import RankScheduler
from dynrank.driver.schedulers import with_inner
from dynrank.driver.validation import attributes_kept
from dynrank.schedules import How, Stage
from dynrank.targets import Rank
from dynrank.triggers import At

pytestmark = pytest.mark.filterwarnings("ignore")


class Keeping(nn.Module):
    """Keeps of its calls what modules keep."""

    def __init__(self):
        super().__init__()
        self.register_buffer("in_place", torch.zeros(2))
        self.register_buffer("replaced", torch.zeros(()))
        self.best = MaxMetric()
        self.metrics = MetricCollection({"mean": MeanMetric(), "all": CatMetric()})
        self.count = 0
        self.last = None
        self.curve = []
        self.curves = {"a": [], "b": {"c": 1}}
        self.names = set()
        self.window = deque(maxlen=2)
        self.words = Counter()
        self.scorer = None
        self.alias = self.curve

    def forward(self, x):
        self.in_place += x
        self.replaced = self.replaced + x.sum()
        self.best.update(x.max())
        self.metrics.update(x)
        self.count += 1
        self.last = x
        self.curve.append(self.count)
        self.curves["a"].append(self.count)
        self.curves["b"]["c"] = self.count
        self.curves[self.count] = x
        self.names.add(self.count)
        self.window.append(self.count)
        self.words.update(["word"])
        self.new = self.count
        if self.scorer is None:
            self.scorer = nn.Linear
        return x

    def kept(self):
        values = [self.in_place, self.replaced, self.best.compute(), *self.metrics.compute().values(), self.last]
        plain = [self.count, self.curve, self.alias, self.curves, self.names, list(self.window), self.words]
        return str([*values, *plain, hasattr(self, "new"), list(self.state_dict().items())])


@pytest.mark.parametrize("calls", [0, 1, 3])
@pytest.mark.parametrize("inference", [False, True])
def test_attributes_are_as_if_nothing_had_been_called(calls, inference):
    module, other = Keeping(), Keeping()
    for i in range(calls):
        for each in (module, other):
            each(torch.full((2,), float(i)))
    curve = module.curve
    with attributes_kept(module.modules()), torch.inference_mode(inference):
        for x in (5.0, 6.0):
            module(torch.full((2,), x))
        assert calls == 0 or module.kept() != other.kept()
    assert module.kept() == other.kept()
    # Who holds the list sees it, too; an object that was made for good stays.
    assert module.curve is curve
    assert module.scorer is nn.Linear
    for each in (module, other):
        each(torch.full((2,), 2.0))
    assert module.kept() == other.kept()


class Recording(Callback):
    """What callbacks find after each batch and validation."""

    def __init__(self):
        self.found = []

    def _record(self, trainer, pl_module):
        metrics = [{k: float(v) for k, v in m.items()} for m in (trainer.callback_metrics, trainer.logged_metrics)]
        progress = trainer.fit_loop.epoch_loop.val_loop.batch_progress.state_dict()
        self.found.append((trainer.global_step, metrics, progress, float(pl_module.best.compute()), [*pl_module.curve]))

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self._record(trainer, pl_module)

    def on_validation_end(self, trainer, pl_module):
        self._record(trainer, pl_module)


def of_lightning(make, folder):
    """A module as they are in templates: with the best of its metric, a curve, and files beside its checkpoints."""

    class Module(make):
        def __init__(self):
            super().__init__()
            self.mean = MeanMetric()
            self.best = MaxMetric()
            self.curve = []

        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            self.mean.update(self.net(batch[0]).square().mean())
            self.log("val/mean", self.mean)

        def on_validation_epoch_end(self):
            self.best.update(self.mean.compute())
            self.log("val/best", self.best.compute())
            self.curve.append(float(self.mean.compute()))
            self.logger.log_metrics({"own": self.curve[-1]}, step=self.global_step)
            assert folder in self.trainer.checkpoint_callback.dirpath
            assert self.logger.log_dir
            if not self.trainer.sanity_checking:
                self.trainer.lr_scheduler_configs[0].scheduler.step(1.0)

        def configure_optimizers(self):
            optimizer = torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=1)
            return [optimizer], [{"scheduler": plateau, "monitor": "val/loss", "interval": "epoch", "frequency": 99}]

    return Module


def rows(folder):
    """What the logger has, without the words of the schedule."""
    with open(next(folder.rglob("metrics.csv"))) as file:
        return list(csv.DictReader(file))


def test_a_run_whose_change_is_undone_is_the_run_without_it(fit, regression, tmp_path):
    """Also where its module keeps scores, logs by itself, and steps its scheduler in hooks of validations."""
    results = []
    for name, step in (("none", None), ("undone", 12)):
        recording = Recording()
        stage = Stage(At(step=step or 99), Rank(1), how=How("sqrt", max_regression=0.0))
        scheduler = RankScheduler([stage] if step else [])
        saver = ModelCheckpoint(tmp_path / name, monitor="val/loss")
        module = of_lightning(regression[0], name)()
        module, made = fit(
            scheduler, saver, recording, module=module, logger=CSVLogger(tmp_path / name), log_every_n_steps=1
        )
        assert [event.undone for event in scheduler.history] == [True] * bool(step)
        rates = [group["lr"] for group in made.optimizers[0].param_groups]
        results.append((recording.found, rates, rows(tmp_path / name), module.curve, float(module.best.compute())))
    assert results[0] == results[1]


def test_measurements_see_the_data_of_the_epoch_and_so_does_the_run(regression):
    """Where Lightning makes the loaders anew in each epoch."""
    make, data, trainer = regression
    seen = []

    class Changing(make):
        def val_dataloader(self):
            batches = [(x + self.trainer.current_epoch, y) for x, y in DataLoader(data()[1].dataset, batch_size=4)]
            return DataLoader([(x, y, self.trainer.current_epoch) for x, y in batches], batch_size=None)

        def on_validation_epoch_start(self):
            seen.append([])

        def validation_step(self, batch, batch_idx):
            seen[-1].append(batch[2])
            super().validation_step(batch[:2], batch_idx)

    for options, count in (({"measure": True}, 4), ({}, 20)):
        seen.clear()
        how = How(max_regression=None if options else 9.0)
        scheduler = RankScheduler([Stage(At(step=13), Rank(1), how=how)], **options)
        made = trainer(callbacks=[scheduler], max_epochs=3, reload_dataloaders_every_n_epochs=1, num_sanity_val_steps=0)
        made.fit(Changing(), data()[0])
        # The loader of an epoch has 10 batches.
        assert seen == [[0] * 20, [1] * count, [1] * count, [1] * 20, [2] * 20]


@pytest.mark.parametrize("mode", ["min_size", "max_size_cycle"])
def test_measurements_take_all_of_loaders_that_are_read_together(regression, mode):
    make, data, trainer = regression
    rows = data()[1].dataset
    loaders = {"a": DataLoader(rows, batch_size=4), "b": DataLoader(rows, batch_size=5)}

    class Combined(make):
        def validation_step(self, batch, batch_idx):
            super().validation_step(batch["a"], batch_idx)

    scheduler = RankScheduler([Stage(At(step=13), Rank(1))], measure=True)
    trainer(callbacks=[scheduler], max_steps=20).fit(Combined(), data()[0], CombinedLoader(loaders, mode))
    assert scheduler.history[0].measured.all_data


def test_schedulers_inside_others_are_found():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    inner = [torch.optim.lr_scheduler.ConstantLR(optimizer), torch.optim.lr_scheduler.LinearLR(optimizer)]
    outer = torch.optim.lr_scheduler.SequentialLR(optimizer, inner, milestones=[3])
    assert {*with_inner([outer])} == {outer, *inner}
