"""What is told of a change of rank: files, a printed table, any logger, TensorBoard, bars."""

import pytest
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tables import rows
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dynrank.callbacks import RankMonitor, RankScheduler
from dynrank.schedules import How, Stage
from dynrank.targets import Budget, GrowTo, Rank
from dynrank.triggers import At

RAISED = Stage(At(step=4), Rank(3), how=How(lr_factor=2.0))


@pytest.fixture
def changed(fit):
    """Trains from rank 6 to 3 after the fourth step, beside these callbacks; returns (event, trainer)."""

    def run(*callbacks, stage=RAISED, **options):
        scheduler = RankScheduler(stage)
        _, trainer = fit(scheduler, *callbacks, **{"max_steps": 8, "log_every_n_steps": 1, **options})
        for logger in trainer.loggers:
            logger.finalize("success")
        return scheduler.history[0], trainer

    return run


@pytest.mark.parametrize("most", [None, 0.0])
def test_history_and_table_of_a_change_that_is_made_or_undone(changed, tmp_path, capsys, most):
    """Also in the files of a run that is resumed after it."""
    first, second = (RankMonitor(tmp_path / f"{name}.csv", model_name="net") for name in ("first", "second"))
    stage = Stage(At(step=4), Budget(share=0.5), how=How(max_regression=most))
    event, trainer = changed(first, stage=stage)
    found = rows(first.history_file)
    for row, layer in zip(found, event.layers, strict=True):
        told = [row[name] for name in ("step", "layer", "rank_before", "rank_after")]
        assert told == ["4", layer.layer.removeprefix("net."), str(layer.rank_before), str(layer.rank_after)]
        for name in ("importance", "importance_error", "predicted_error"):
            assert float(row[name]) == pytest.approx(getattr(layer, name), rel=1e-4) != 0
        assert row["reason"].startswith("undone: step 4; val/loss" if event.undone else "step 4")
    assert f"rank change at step 4: {found[0]['reason'][:14]}" in capsys.readouterr().out
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    changed(second, stage=stage, max_steps=12, ckpt_path=tmp_path / "last.ckpt")
    assert rows(second.history_file) == found


def test_printed_table_knows_the_layers_that_did_not_change(changed, capsys):
    # A growth balances no other layer.
    changed(RankMonitor(model_name="net"), stage=Stage(At(step=4), GrowTo({"0": 7})))
    printed = " ".join(capsys.readouterr().out.split())
    assert "│ all │ 1 of 2 │ 6 → 7 │" in printed
    assert "highest rank 7, average 6.5" in printed


def test_ranks_are_in_the_rows_of_steps_and_changes(changed, tmp_path):
    logger = CSVLogger(tmp_path, name="", version="")
    event, _ = changed(RankMonitor(), logger=logger)
    size = sum(layer.params_per_rank for layer in event.layers)
    found = rows(tmp_path / "metrics.csv", "rank/parameters")
    expected = [(step, rank, rank, rank * size) for step, rank in ((0, 6), (4, 3))]
    names = ("step", "rank/mean", "rank/max", "rank/parameters")
    assert [tuple(float(row[name]) for name in names) for row in found] == expected
    # A table of hundreds of columns helps nobody.
    assert not [name for name in found[0] if name.startswith("rank/layer")]


def test_tensorboard_shows_ranks_and_the_rates_of_the_program_and_of_adapters(changed, tmp_path):
    """By Lightning's own LearningRateMonitor and by RankMonitor."""
    logger = TensorBoardLogger(tmp_path, name="", version="")
    changed(LearningRateMonitor("step"), RankMonitor(model_name="net"), logger=logger)
    board = EventAccumulator(str(tmp_path)).Reload()
    shown = {}
    for name in ("rank/layer/0", "rank/layer/2", "rank/mean", "rank/max", "lr-AdamW", "lr/0", "lr/adapter"):
        shown[name] = {point.step: point.value for point in board.Scalars(name)}
    assert shown["rank/layer/0"] == shown["rank/layer/2"] == {0: 6, 4: 3}
    assert shown["rank/mean"] == {step: 6 if step < 4 else 3 for step in range(8)}
    assert shown["rank/max"] == {0: 6, 4: 3}
    assert shown["lr/0"] == shown["lr-AdamW"]
    assert shown["lr/adapter"] == pytest.approx({step: 2 * shown["lr/0"][step] for step in range(4, 8)})


def test_monitor_without_a_scheduler_writes_an_empty_history(fit, tmp_path):
    fit(RankMonitor(tmp_path / "history.csv"), max_steps=2)
    assert rows(tmp_path / "history.csv") == []
