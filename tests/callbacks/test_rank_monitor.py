import csv

import lightning
import pytest
import torch

from dynrank.callbacks import RankMonitor, RankScheduler, RunMeter
from dynrank.callbacks.rank_monitor import group_layers
from dynrank.resizing import LayerReport
from dynrank.schedules import after_convergence


def report(name):
    return LayerReport(name, 8, 4, 0.9, 0.1, (1.0,), 10)


def test_layers_are_grouped_by_their_name_without_numbers():
    names = ["m.h.0.attn.q", "m.h.11.attn.q", "m.h.0.mlp", "m.head"]
    groups = group_layers(report(name) for name in names)
    assert {name: len(layers) for name, layers in groups.items()} == {"attn.q": 2, "mlp": 1, "m.head": 1}


def test_groups_keep_their_full_names_where_the_short_ones_collide():
    groups = group_layers(report(name) for name in ["encoder.0.q", "decoder.0.q"])
    assert set(groups) == {"encoder.*.q", "decoder.*.q"}


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

    for _ in range(3):
        meter.on_train_batch_start(None, None, None, 0)
        meter.on_train_batch_end(None, None, None, {"attention_mask": torch.tensor([[1, 1, 0], [1, 0, 0]])}, 0)
    assert meter.tokens == 9
    assert meter.tokens_per_second == pytest.approx(9 / meter.train_seconds)


def test_monitor_without_a_scheduler_does_nothing(regression, tmp_path):
    module_class, data, trainer = regression
    trainer(callbacks=[RankMonitor(tmp_path / "history.csv")], max_steps=2).fit(module_class(), *data())
    assert (tmp_path / "history.csv").read_text().count("\n") == 1
