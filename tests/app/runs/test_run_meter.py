"""Tokens and seconds of a run, and its peak memory."""

import subprocess
import sys
from inspect import getsource
from pathlib import Path

import pytest
import torch

from dynrank.app.runs import run_meter
from dynrank.app.runs.run_meter import RunMeter, peak_memory_bytes
from dynrank.callbacks import AdapterCheckpoint, RankScheduler


class Tokens(RunMeter):
    """Of batches without a mask: a token a row, and one of padding."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        batch = {"attention_mask": torch.tensor([[1, 0]] * len(batch[0]))}
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)


def test_a_resumed_run_measures_what_it_trains_itself(fit, tmp_path):
    def measured(**options):
        meter = Tokens()
        fit(RankScheduler([]), meter, max_steps=8, **options)
        assert meter.tokens_per_second == pytest.approx(meter.tokens / meter.seconds if meter.tokens else 0)
        return meter.tokens

    assert measured(saved=tmp_path, kind=AdapterCheckpoint) == 64
    assert measured(ckpt_path=tmp_path / "step=6.ckpt") == 16
    assert measured(ckpt_path=tmp_path / "step=8.ckpt") == 0


def test_tokens_of_two_processes_and_of_all_batches_of_a_step_count_once(fit, monkeypatch):
    """The second process has as many tokens as this one."""
    monkeypatch.setattr(run_meter, "from_all", lambda tokens: [tokens, tokens])
    meter = Tokens()
    fit(meter, max_steps=3, accumulate_grad_batches=2)
    assert meter.tokens == 2 * 3 * 2 * 8


# The function without its module, whose imports take seconds, on a machine that has no GPU.
ALONE = f"""
import re
import resource
import sys
from pathlib import Path
from types import SimpleNamespace
torch = SimpleNamespace(cuda=SimpleNamespace(is_available=lambda: False))
{getsource(peak_memory_bytes)}
block = b"1" * (1 << 26)
print(peak_memory_bytes())
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="without /proc the peak of before counts, too")
def test_peak_memory_holds_a_block_and_is_not_that_of_the_program_before():
    before = f"import os, sys; b'1' * (1 << 29); os.execv(sys.executable, [sys.executable, '-c', {ALONE!r}])"
    done = subprocess.run([sys.executable, "-c", before], capture_output=True, text=True, check=True)
    assert 1 << 26 < int(done.stdout) < 1 << 29
