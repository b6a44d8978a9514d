"""A validation for a change leaves no trace in the program that is validated."""

import csv
from collections import deque

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import CombinedLoader
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics import CatMetric, MaxMetric, MeanMetric, Metric, MetricCollection, MetricTracker

import dynrank
from dynrank.callbacks import RankScheduler
from dynrank.driver.schedulers import with_inner
from dynrank.driver.training import Training
from dynrank.driver.validation import attributes_kept, is_metric, validate
from dynrank.schedules import How, Stage
from dynrank.targets import Rank
from dynrank.triggers import At

pytestmark = pytest.mark.filterwarnings("ignore")


class Metrics(nn.Module):
    """Metrics of torchmetrics, and one of the user's."""

    class Own(Metric):
        full_state_update = False

        def __init__(self):
            super().__init__()
            self.add_state("total", torch.zeros(()), "sum")
            self.calls = 0
            self.window = deque(maxlen=2)

        def update(self, x):
            self.total += x.sum()
            self.calls += 1
            self.window.append(float(x.max()))

        def compute(self):
            return self.total + 100 * self.calls + sum(self.window)

    def __init__(self):
        super().__init__()
        self.best = MaxMetric()
        self.group = MetricCollection({"mean": MeanMetric(), "all": CatMetric(), "own": self.Own()})
        self.tracker = MetricTracker(MeanMetric(), maximize=False)

    def forward(self, x):
        self.tracker.increment()
        for metric in (self.best, self.group, self.tracker):
            metric.update(x)

    def found(self):
        tracked = [self.tracker.best_metric(return_step=True), self.tracker.n_steps] if len(self.tracker) > 1 else []
        return str([self.best.compute(), self.group.compute(), tracked, len(self.tracker)])


@pytest.mark.parametrize("calls", [0, 1, 3])
@pytest.mark.parametrize("inference", [False, True])
def test_metrics_are_as_if_nothing_had_been_validated(calls, inference):
    metrics, other = Metrics(), Metrics()
    for i in range(calls):
        for each in (metrics, other):
            each(torch.full((2,), float(i)))
            each.found()
    with attributes_kept([part for part in metrics.modules() if is_metric(part)]), torch.inference_mode(inference):
        for x in (5.0, 6.0):
            metrics(torch.full((2,), x))
        assert metrics.found() != other.found()
    for last in (0.5, 7.0):
        assert metrics.found() == other.found()
        for each in (metrics, other):
            each(torch.full((2,), last))


class Graph(Training):
    """A loop that validates a module with buffers: one of a graph, one with NaN that is expanded, one that changes."""

    def validate(self):
        assert dynrank.validating_change()
        # As PyTorch's tutorials do, and leave the model so.
        self.model.eval()
        self.model(torch.ones(1, 4))
        return {"val/loss": 1.0}


class Buffered(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(4, 4)
        self.register_buffer("adjacency", torch.eye(4).to_sparse())
        self.register_buffer("expanded", torch.tensor(float("nan")).expand(3))
        self.register_buffer("seen", torch.zeros(4))
        self.register_buffer("best", torch.tensor(torch.inf))
        self.register_buffer("cache", torch.zeros(0), persistent=False)
        self.drop = nn.Dropout(0.5)
        self.size = 0
        self.cached = None

    def forward(self, x):
        self.seen += x.sum(0)
        self.best = torch.minimum(self.best, x.min())
        # What belongs together stays together.
        if self.size != len(x):
            self.size = len(x)
            self.cached = [len(x)]
            self.cache = torch.zeros(len(x))
        return self.drop(self.lin(x @ self.adjacency))


def test_buffers_are_as_before_and_what_a_layer_caches_stays():
    model = dynrank.add_lora(Buffered(), rank=2, target_modules=["lin"])
    loop = Graph(model, [torch.optim.SGD(dynrank.adapter_parameters(model), lr=0.1)])
    # Somebody has frozen the statistics of one layer.
    model.lin.eval()
    modes = [module.training for module in model.modules()]
    assert validate(loop) == {"val/loss": 1.0}
    assert not dynrank.validating_change()
    assert [module.training for module in model.modules()] == modes
    assert model.seen.tolist() == [0.0] * 4
    assert model.best == torch.inf
    assert (model.size, model.cached, len(model.cache)) == (1, [1], 1)


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
            if not dynrank.validating_change():
                self.curve.append(float(self.mean.compute()))
            self.logger.log_metrics({"own": float(self.mean.compute())}, step=self.global_step)
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
    """Where Lightning makes the loaders anew in each epoch; each batch has its number, and hooks find the data."""
    make, data, trainer = regression
    seen = []

    class Changing(make):
        def val_dataloader(self):
            batches = [(x + self.trainer.current_epoch, y) for x, y in DataLoader(data()[1].dataset, batch_size=4)]
            self.epoch = self.trainer.current_epoch
            return DataLoader([(x, y, self.epoch, i) for i, (x, y) in enumerate(batches)], batch_size=None)

        def on_validation_epoch_start(self):
            assert len(self.trainer.val_dataloaders.dataset) == 20
            seen.append([])

        def validation_step(self, batch, batch_idx):
            assert [self.epoch, batch_idx] == batch[2:]
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


def test_loaders_with_one_generator_of_their_own_go_on_as_if_nothing_had_been_validated(regression):
    """As PyTorch's page on reproducibility makes them; both validations for a change have the same rows."""
    make, data, trainer = regression
    rows = data()[1].dataset
    trained = []
    for stages in ([], [Stage(At(step=13), Rank(1), how=How(max_regression=0.0))]):
        trained.append([])
        validated = []

        class Seeing(make):
            def training_step(self, batch, batch_idx, seen=trained[-1]):
                seen.append(batch[0].tolist())
                return super().training_step(batch, batch_idx)

            def validation_step(self, batch, batch_idx, seen=validated):
                if dynrank.validating_change():
                    seen.append(batch[0].tolist())
                super().validation_step(batch, batch_idx)

        generator = torch.Generator().manual_seed(0)
        loaders = [DataLoader(rows, batch_size=8, shuffle=True, generator=generator) for _ in range(2)]
        trainer(callbacks=[RankScheduler(stages)], max_epochs=3, limit_val_batches=2).fit(Seeing(), *loaders)
        assert validated[:2] == validated[2:]
        assert len(validated) == 4 * len(stages)
    assert trained[0] == trained[1]


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
