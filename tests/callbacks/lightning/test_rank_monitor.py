"""What is told of a change of rank: files, a printed table, any logger, TensorBoard, bars."""

import math

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from tables import rows
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dynrank.app.runs.trainer import _Bar
from dynrank.callbacks import RankMonitor, RankScheduler
from dynrank.schedules import How, Stage
from dynrank.targets import Budget, GrowTo, Rank
from dynrank.triggers import At


@pytest.fixture
def changed(fit):
    """Trains from rank 6 to 3 after the fourth step, beside these callbacks; returns (module, scheduler, trainer)."""

    def run(*callbacks, stage=None, **options):
        scheduler = RankScheduler(stage or Stage(At(step=4), Rank(3)))
        module, trainer = fit(scheduler, *callbacks, **{"max_steps": 8, "log_every_n_steps": 1, **options})
        for logger in trainer.loggers:
            logger.finalize("success")
        return module, scheduler, trainer

    return run


def test_files_table_and_metrics_of_a_change(changed, tmp_path, capsys):
    monitor = RankMonitor(tmp_path / "rank_history.csv", model_name="net")
    _, scheduler, _ = changed(monitor, logger=CSVLogger(tmp_path, name="", version=""))
    found = rows(monitor.history_file)
    (event,) = scheduler.history
    changes = [(row["step"], row["layer"], row["rank_before"], row["rank_after"]) for row in found]
    assert changes == [("4", "0", "6", "3"), ("4", "2", "6", "3")]
    errors = [layer.predicted_error for layer in event.layers]
    assert [float(row["predicted_error"]) for row in found] == pytest.approx(errors, rel=1e-4)
    assert "rank change at step 4" in capsys.readouterr().out
    found = rows(tmp_path / "metrics.csv", "rank/mean")
    # From the start on, and in the row of every step.
    shown = {(int(row["step"]), float(row["rank/mean"]), float(row["rank/parameters"])) for row in found}
    sizes = {rank: rank * sum(layer.params_per_rank for layer in event.layers) for rank in (6, 3)}
    assert shown == {(step, rank, sizes[rank]) for step in range(8) for rank in [6 if step < 4 else 3]}
    assert all(row["rank/mean"] == row["rank/max"] for row in found)
    # A table of hundreds of columns helps nobody.
    assert not [name for name in found[0] if name.endswith(("/0", "/2")) and name != "lr/0"]


def test_ranks_are_logged_with_every_validation_where_few_steps_are_logged(changed, tmp_path):
    changed(RankMonitor(), logger=CSVLogger(tmp_path, name="", version=""), log_every_n_steps=100)
    validated = [int(row["step"]) for row in rows(tmp_path / "metrics.csv", "val/loss")]
    assert validated
    found = [(int(row["step"]), float(row["rank/mean"])) for row in rows(tmp_path / "metrics.csv", "rank/mean")]
    shown = [(0, 6.0), *((step, 6.0 if step < 4 else 3.0) for step in validated), (4, 3.0)]
    assert sorted(found) == sorted(shown)


def test_history_has_the_importance_of_layers_that_share_a_pool_by_it(changed, tmp_path):
    monitor = RankMonitor(tmp_path / "rank_history.csv", model_name="net")
    _, scheduler, _ = changed(monitor, stage=Stage(At(step=4), Budget(share=0.5)))
    (event,) = scheduler.history
    found = [(float(row["importance"]), float(row["importance_error"])) for row in rows(monitor.history_file)]
    assert found == [pytest.approx((layer.importance, layer.importance_error), rel=1e-4) for layer in event.layers]
    assert all(error > 0 for _, error in found)


def test_printed_table_knows_the_layers_that_did_not_change(changed, capsys):
    # A growth balances no other layer.
    changed(RankMonitor(model_name="net"), stage=Stage(At(step=4), GrowTo({"0": 7})))
    printed = " ".join(capsys.readouterr().out.split())
    assert "│ all │ 1 of 2 │ 6 → 7 │" in printed
    assert "highest rank 7, average 6.5" in printed


class Taken(lightning.Callback):
    """The highest rate of each step, as the optimizer had it."""

    def on_train_start(self, trainer, pl_module):
        self.rates = []
        (optimizer,) = trainer.optimizers
        optimizer.register_step_pre_hook(lambda *_: self.rates.append(max(g["lr"] for g in optimizer.param_groups)))


RAISED = Stage(At(step=4), Rank(3), how=How(lr_factor=2.0))


def test_tensorboard_and_wandb_show_the_ranks_and_the_rate_that_the_step_takes(changed, tmp_path, wandb_run):
    """By Lightning's own LearningRateMonitor and by RankMonitor, read back from the files of both."""
    taken = Taken()
    run, stored = wandb_run
    loggers = [TensorBoardLogger(tmp_path, name="", version=""), WandbLogger(experiment=run)]
    monitors = LearningRateMonitor("step"), RankMonitor(model_name="net")
    _, scheduler, _ = changed(taken, *monitors, logger=loggers, stage=RAISED)
    assert taken.rates[4] == pytest.approx(2 * 0.5e-2 * (1 + math.cos(math.pi * 4 / 60)))
    assert scheduler.driver.lr_factor == 2
    board = EventAccumulator(str(tmp_path)).Reload()
    rows_of_wandb = stored()
    logged = dict.fromkeys(["rank/layer/0", "rank/layer/2"], [6, 3])
    logged |= dict.fromkeys(["rank/mean", "rank/max"], [3] * 5)
    logged |= dict.fromkeys(["lr-AdamW", "lr/0"], taken.rates[-3:])
    for name, expected in logged.items():
        shown = [point.value for point in board.Scalars(name)]
        assert shown[-len(expected) :] == pytest.approx(expected)
        assert [row[name] for row in rows_of_wandb if name in row] == pytest.approx(shown)


def test_what_stays_the_same_is_logged_once_an_epoch_and_stands_in_every_row(fit, regression, tmp_path):
    """An epoch has ten batches, of which two make a step."""
    logged = []

    class Constant(regression[0]):
        def configure_optimizers(self):
            return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)

        def log(self, name, value, **options):
            if self.trainer.training:
                logged.append((name, self.trainer.current_epoch))
            super().log(name, value, **options)

    options = {"logger": CSVLogger(tmp_path, name="", version=""), "log_every_n_steps": 1}
    stage = Stage(At(step=7), Rank(3))
    fit(RankScheduler(stage), RankMonitor(), module=Constant(), max_steps=12, accumulate_grad_batches=2, **options)
    # The change of rank comes in the second epoch.
    of_ranks = ["rank/max", "rank/parameters", "rank/mean"]
    once = [[(name, epoch) for name in ("lr/0", *of_ranks)] for epoch in range(3)]
    assert logged == [*once[0], *once[1], *((name, 1) for name in of_ranks), *once[2]]
    assert [int(row["step"]) for row in rows(tmp_path / "metrics.csv", "lr/0")] == [*range(12)]


def test_second_fit_of_a_trainer_keeps_the_raised_rate(changed, regression):
    """Its optimizer and scheduler are new ones."""
    taken = Taken()
    module, scheduler, trainer = changed(taken, stage=RAISED)
    trainer.fit_loop.epoch_loop.max_steps = 12
    trainer.fit(module, *regression[1]())
    assert (len(taken.rates), len(scheduler.history)) == (4, 1)
    assert taken.rates[0] == pytest.approx(2e-2)


@pytest.mark.parametrize("own_step", [False, True])
def test_rate_of_an_adapter_is_logged_beside_that_of_a_head_in_its_group(fit, regression, tmp_path, own_step):
    """So it is of an adapter alone, if the module has an own optimizer_step, which may set rates."""

    class Sharing(regression[0]):
        def __init__(self):
            super().__init__()
            self.head = torch.nn.Parameter(torch.zeros(1))

        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) + self.head.square().sum()

    class Warming(regression[0]):
        def optimizer_step(self, *args):
            super().optimizer_step(*args)

    taken = Taken()
    module = Warming() if own_step else Sharing()
    options = {"logger": CSVLogger(tmp_path, name="", version=""), "log_every_n_steps": 1}
    fit(RankScheduler(RAISED), RankMonitor(), LearningRateMonitor("step"), taken, module=module, **options)
    logged = {
        name: {int(row["step"]): float(row[name]) for row in rows(tmp_path / "metrics.csv", name)}
        for name in ("lr/adapter", "lr/0", "lr-AdamW")
    }
    # Lightning's own monitor has the group's rate of the same steps.
    shown = {step: 2 * rate for step, rate in logged["lr-AdamW"].items() if step >= 4}
    assert logged["lr/adapter"] == pytest.approx(shown)
    assert logged["lr/adapter"] == pytest.approx(dict(enumerate(taken.rates[4:], 4)))
    assert [*logged["lr/0"].values()][4:] == pytest.approx([rate / 2 for rate in taken.rates[4:]])


def test_change_taken_back_is_recorded_as_such(changed, tmp_path, capsys):
    monitor = RankMonitor(tmp_path / "history.csv")
    stage = Stage(At(step=15), Rank(1), how=How(max_regression=0.0))
    _, scheduler, _ = changed(monitor, stage=stage, max_steps=20)
    found = rows(monitor.history_file)
    assert len(found) == sum(len(event.layers) for event in scheduler.history)
    assert all(row["reason"].startswith("undone: val/loss") for row in found)
    assert "rank change undone at step 15" in capsys.readouterr().out


def test_history_of_a_resumed_run_holds_the_change_before_the_checkpoint(changed, tmp_path):
    first = RankMonitor(tmp_path / "first.csv")
    second = RankMonitor(tmp_path / "second.csv")
    *_, trainer = changed(first)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    changed(second, max_steps=12, ckpt_path=tmp_path / "last.ckpt")
    assert rows(second.history_file) == rows(first.history_file) != []


def test_monitor_without_a_scheduler_writes_an_empty_history(fit, tmp_path):
    fit(RankMonitor(tmp_path / "history.csv"), max_steps=2)
    assert rows(tmp_path / "history.csv") == []


def test_progress_bar_shows_the_rank_and_no_total_of_epochs_that_there_is_not(changed):
    seen = []

    class Bar(_Bar):
        def on_train_batch_end(self, trainer, pl_module, *args):
            super().on_train_batch_end(trainer, pl_module, *args)
            rank = self.get_metrics(trainer, pl_module)["rank/mean"]
            seen.append((rank, self.train_progress_bar.description.strip()))

    changed(Bar(), RankMonitor(), enable_progress_bar=True)
    assert seen == [(6, "Epoch 0")] * 4 + [(3, "Epoch 0")] * 4
