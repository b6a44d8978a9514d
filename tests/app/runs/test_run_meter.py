"""Tokens and seconds of a run, its peak memory, and its progress bar."""

import os

import pytest
import torch

from dynrank.app.runs import run_meter
from dynrank.app.runs.run_meter import RunMeter, peak_memory_bytes
from dynrank.app.runs.trainer import _Bar
from dynrank.callbacks import AdapterCheckpoint, RankMonitor, RankScheduler
from dynrank.schedules import Stage
from dynrank.targets import Rank
from dynrank.triggers import At


class Tokens(RunMeter):
    """Of batches without a mask: a token a row, and one of padding."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        batch = {"attention_mask": torch.tensor([[1, 0]] * len(batch[0]))}
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)


def test_tokens_are_those_of_all_processes_that_this_run_has_trained_itself(fit, tmp_path, monkeypatch):
    """The second process has as many tokens as this one."""
    monkeypatch.setattr(run_meter, "from_all", lambda tokens: [tokens, tokens])

    def measured(**options):
        meter = Tokens()
        fit(RankScheduler([]), meter, max_steps=8, accumulate_grad_batches=2, **options)
        assert meter.tokens_per_second == pytest.approx(meter.tokens / meter.seconds if meter.tokens else 0)
        return meter.tokens

    of_step = 2 * 2 * 8
    assert measured(saved=tmp_path, kind=AdapterCheckpoint) == 8 * of_step
    assert measured(ckpt_path=tmp_path / "step=6.ckpt") == 2 * of_step
    assert measured(ckpt_path=tmp_path / "step=8.ckpt") == 0


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="here a peak of before counts, too")
def test_peak_memory_is_that_since_the_training_began(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    # This number survives exec.
    monkeypatch.delattr("resource.getrusage")
    block = b"1" * (1 << 28)
    before = peak_memory_bytes()
    assert before > len(block)
    del block
    RunMeter().on_train_start(None, None)
    assert peak_memory_bytes() < before - (1 << 27)


def test_progress_bar_shows_the_rank_and_no_total_of_epochs_that_there_is_not(regression):
    make, data, trainer = regression
    seen = []

    class Bar(_Bar):
        def on_train_batch_end(self, trainer, pl_module, *args):
            super().on_train_batch_end(trainer, pl_module, *args)
            rank = self.get_metrics(trainer, pl_module)["rank/mean"]
            seen.append((rank, self.train_progress_bar.description.strip()))

    callbacks = [Bar(), RankMonitor(), RankScheduler(Stage(At(step=4), Rank(2)))]
    trainer(max_steps=8, enable_progress_bar=True, callbacks=callbacks).fit(make(), *data())
    (before, first), *_, (after, last) = seen
    assert before > after == 2
    assert first == last == "Epoch 0"
