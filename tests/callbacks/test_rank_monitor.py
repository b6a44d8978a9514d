import csv
from types import SimpleNamespace

import lightning
import pytest
import torch

import dynrank
from dynrank.callbacks import RankMonitor, RankScheduler, RunMeter
from dynrank.schedules import How, Stage, after_convergence
from dynrank.targets import Rank
from dynrank.triggers import At


def test_monitor_records_prints_and_logs_the_change(regression, tmp_path, capsys):
    module_class, data, trainer = regression
    file = tmp_path / "rank_history.csv"
    logger = lightning.pytorch.loggers.CSVLogger(tmp_path, name="", version="")
    callbacks = [RankScheduler(after_convergence(3, deadline=0.5)), RankMonitor(file, model_name="net")]
    fitted = trainer(callbacks=callbacks, logger=logger, max_steps=10, log_every_n_steps=1)
    module = module_class()
    fitted.fit(module, *data())
    with file.open(newline="") as opened:
        rows = list(csv.DictReader(opened))
    assert [(row["step"], row["layer"], row["rank_before"], row["rank_after"]) for row in rows] == [
        ("5", "0", "6", "3"),
        ("5", "2", "6", "3"),
    ]
    assert "rank change at step 5" in capsys.readouterr().out
    logger.save()
    with (tmp_path / "metrics.csv").open(newline="") as opened:
        means = [float(row["rank/mean"]) for row in csv.DictReader(opened) if row.get("rank/mean")]
    assert means == [6.0, 3.0]


def test_prediction_is_recorded_before_the_change_and_is_what_happens(regression, tmp_path):
    module_class, data, trainer = regression
    predictions, history = tmp_path / "predictions.csv", tmp_path / "history.csv"

    class Spy(lightning.Callback):
        def on_rank_prediction(self, trainer, pl_module, event):
            self.ranks = [layer.rank for _, layer in dynrank.lora_layers(pl_module)]
            self.deltas = [layer.delta_weight().detach().double() for _, layer in dynrank.lora_layers(pl_module)]

    spy, scheduler = Spy(), RankScheduler([Stage(At(step=5), Rank(2))])
    monitor = RankMonitor(history, prediction_file=predictions)
    module = module_class()
    check = Spy()
    check.on_rank_change = lambda trainer, pl_module, event: check.on_rank_prediction(trainer, pl_module, event)
    check.on_rank_prediction = Spy.on_rank_prediction.__get__(check)
    trainer(callbacks=[scheduler, spy, check, monitor], max_steps=8).fit(module, *data())
    assert spy.ranks == [6, 6]
    assert predictions.read_text() == history.read_text()
    with predictions.open(newline="") as opened:
        errors = [float(row["predicted_error"]) for row in csv.DictReader(opened)]
    made = [float((old - new).norm()) for old, new in zip(spy.deltas, check.deltas, strict=True)]
    assert errors == pytest.approx(made, rel=1e-4)  # float32 factors


def test_change_taken_back_is_recorded_as_such(regression, tmp_path, capsys):
    module_class, data, trainer = regression
    scheduler = RankScheduler([Stage(At(step=15), Rank(1))], How(max_regression=0.0))
    monitor = RankMonitor(tmp_path / "history.csv")
    trainer(callbacks=[scheduler, monitor], max_steps=20).fit(module_class(), *data())
    with (tmp_path / "history.csv").open(newline="") as opened:
        rows = list(csv.DictReader(opened))
    assert len(rows) == sum(len(event.layers) for event in scheduler.history)
    assert all(row["reason"].startswith("undone: val/loss") for row in rows)
    assert "rank taken back at step 15" in capsys.readouterr().out


def test_history_of_a_resumed_run_holds_the_change_before_the_checkpoint(regression, tmp_path):
    module_class, data, trainer = regression
    first = trainer(
        callbacks=[RankScheduler(after_convergence(3, deadline=0.5)), RankMonitor(tmp_path / "first.csv")], max_steps=10
    )
    first.fit(module_class(), *data())
    first.save_checkpoint(tmp_path / "last.ckpt")
    second = trainer(
        callbacks=[RankScheduler(after_convergence(3, deadline=0.5)), RankMonitor(tmp_path / "second.csv")],
        max_steps=15,
    )
    second.fit(module_class(), *data(), ckpt_path=tmp_path / "last.ckpt")
    assert (tmp_path / "first.csv").read_text() == (tmp_path / "second.csv").read_text()


def test_meter_counts_tokens_without_padding():
    meter = RunMeter()

    for step in (1, 2, 3):
        meter.on_train_batch_start(None, None, None, 0)
        batch = {"attention_mask": torch.tensor([[1, 1, 0], [1, 0, 0]])}
        meter.on_train_batch_end(SimpleNamespace(global_step=step), None, None, batch, 0)
    assert meter.tokens == 9
    assert meter.tokens_per_second == pytest.approx(9 / meter.train_seconds)


def test_monitor_without_a_scheduler_does_nothing(regression, tmp_path):
    module_class, data, trainer = regression
    trainer(callbacks=[RankMonitor(tmp_path / "history.csv")], max_steps=2).fit(module_class(), *data())
    assert (tmp_path / "history.csv").read_text().count("\n") == 1
