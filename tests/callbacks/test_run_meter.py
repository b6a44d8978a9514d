"""Tokens and seconds of a run, in each phase between changes of rank."""

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from tables import rows
from torch import nn

from dynrank.callbacks import AdapterCheckpoint, RankEvent, RankScheduler, RunMeter, peak_memory_bytes, run_meter
from dynrank.schedules import Stage
from dynrank.targets import Rank
from dynrank.triggers import At


class Tokens(RunMeter):
    """Of batches without a mask: a token a row, and one of padding."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        batch = {"attention_mask": torch.tensor([[1, 0]] * len(batch[0]))}
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)


def test_phases_divide_the_run_at_each_change(fit, tmp_path):
    meter = Tokens()
    logger = CSVLogger(tmp_path, name="", version="")
    options = {"max_steps": 8, "accumulate_grad_batches": 2, "log_every_n_steps": 1}
    fit(RankScheduler([Stage(At(step=4), Rank(3))]), meter, logger=logger, **options)
    assert [(p.first_step, p.mean_rank, p.tokens) for p in meter.phases] == [(0, 6.0, 64), (4, 3.0, 64)]
    for phase in meter.phases:
        assert phase.tokens_per_second == pytest.approx(64 / phase.train_seconds)
        assert 0 < phase.step_seconds < phase.train_seconds
    assert meter.tokens_per_second == pytest.approx(128 / sum(phase.train_seconds for phase in meter.phases))
    logger.save()
    found = rows(tmp_path / "metrics.csv", "phase/mean_rank")
    assert [(row["step"], float(row["phase/mean_rank"])) for row in found] == [("4", 6.0), ("8", 3.0)]


def test_a_resumed_run_measures_what_it_trains_itself(fit, tmp_path):
    def phases(**options):
        meter = Tokens()
        fit(RankScheduler([Stage(At(step=4), Rank(3))]), meter, max_steps=8, **options)
        return [(phase.first_step, phase.mean_rank, phase.tokens) for phase in meter.phases]

    phases(saved=tmp_path, kind=AdapterCheckpoint)
    assert phases(ckpt_path=tmp_path / "step=2.ckpt") == [(2, 6.0, 16), (4, 3.0, 32)]
    assert phases(ckpt_path=tmp_path / "step=6.ckpt") == [(6, 3.0, 16)]
    assert phases(ckpt_path=tmp_path / "step=8.ckpt") == [(8, 3.0, 0)]


def test_tokens_of_two_processes_count_once(monkeypatch):
    """The second process has as many tokens as this one."""
    monkeypatch.setattr(run_meter, "from_all", lambda tokens: [tokens, tokens])
    trainer = SimpleNamespace(world_size=2, global_step=0, loggers=[])
    model = nn.Linear(2, 2)
    meter = RunMeter()
    meter.on_train_start(trainer, model)
    for _ in range(3):
        meter.on_train_batch_start(trainer, model, None, 0)
        trainer.global_step += 1
        meter.on_train_batch_end(trainer, model, None, {"attention_mask": torch.ones(1, 10)}, 0)
    meter.on_train_end(trainer, model)
    # A change after the last step ends no phase twice.
    meter.on_rank_change(trainer, model, RankEvent(0, "", ()))
    assert [phase.tokens for phase in meter.phases] == [60, 0]


def test_peak_memory_is_at_least_a_block_of_this_process():
    block = torch.ones(2**26)
    assert peak_memory_bytes() > block.nbytes
