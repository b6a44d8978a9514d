"""AdapterCheckpoint in Lightning: what its files hold, and that runs go on, are tested and loaded from them."""

import os
import signal

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import nn
from torch.testing import assert_close

from dynrank.callbacks import AdapterCheckpoint, RankScheduler
from dynrank.errors import ConfigurationError
from dynrank.layers.frozen_base import MARK
from dynrank.schedules import Stage
from dynrank.targets import Rank
from dynrank.triggers import At

# An epoch has ten batches.
STEPS = 24
CHANGE = 13


@pytest.fixture(scope="module")
def run(fit):
    """Trains from rank 6 to 3, and saves every step; returns all that it ends with."""

    def run(folder, kind=AdapterCheckpoint, **options):
        scheduler = RankScheduler([Stage(when=At(step=CHANGE), to=Rank(3))])
        module, trainer = fit(scheduler, saved=folder, kind=kind, **options)
        return dict(module.state_dict()), trainer.optimizers[0].state_dict(), str(scheduler.history)

    return run


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    """(folder of the checkpoints of a run, what it ended with)."""
    folder = tmp_path_factory.mktemp("run")
    return folder, run(folder)


def assert_same(one, other):
    assert one[2] == other[2]
    assert_close(one[:2], other[:2], rtol=0, atol=0)


def stored(folder, step):
    return torch.load(folder / f"step={step}.ckpt", weights_only=True)


def test_it_holds_what_is_trained_and_what_lightning_needs(regression, run, whole, tmp_path):
    run(tmp_path, ModelCheckpoint, max_steps=CHANGE)
    theirs = stored(tmp_path, CHANGE)
    ours = stored(whole[0], CHANGE)
    base = {f"net.{i}.base.{kind}" for i in (0, 2) for kind in ("weight", "bias")}
    assert set(theirs["state_dict"]) - set(ours["state_dict"]) == base
    assert set(ours["state_dict"]) - set(theirs["state_dict"]) == {f"net.{MARK}"}
    assert set(ours) == set(theirs)
    state = regression[0].load_from_checkpoint(whole[0] / f"step={STEPS}.ckpt").state_dict()
    assert_close(dict(state), whole[1][0], rtol=0, atol=0)


OURS, THEIRS = AdapterCheckpoint, ModelCheckpoint


@pytest.mark.parametrize(
    ("first", "second", "step"),
    [(OURS, OURS, CHANGE - 1), (OURS, THEIRS, CHANGE), (THEIRS, OURS, CHANGE)],
)
def test_a_run_is_resumed_to_the_bit_also_with_another_kind_of_checkpoint(run, whole, tmp_path, first, second, step):
    run(tmp_path, first, max_steps=max(step, CHANGE))
    assert_same(run(tmp_path, second, ckpt_path=tmp_path / f"step={step}.ckpt"), whole[1])
    assert (f"net.{MARK}" in stored(tmp_path, STEPS)["state_dict"]) == (second is not THEIRS)


@pytest.mark.parametrize("cut", [0, 100])
def test_a_damaged_file_and_another_base_are_refused_before_anything_changes(regression, run, whole, tmp_path, cut):
    module = regression[0]()
    nn.init.normal_(module.net[2].base.weight)
    content = (whole[0] / "step=5.ckpt").read_bytes()
    (tmp_path / "a.ckpt").write_bytes(content[: len(content) - cut])
    said = r"a\.ckpt" if cut else r"'net\.2\.base\.weight' had another shape or other values than here"
    before = str(module.state_dict())
    with pytest.raises(ConfigurationError, match=said):
        run(tmp_path, module=module, ckpt_path=tmp_path / "a.ckpt")
    assert str(module.state_dict()) == before


def test_a_trained_head_and_parameters_trained_for_a_while_come_back(regression, fit, tmp_path):
    class Headed(regression[0]):
        def __init__(self):
            super().__init__()
            self.net.extend([nn.Linear(6, 6), nn.Linear(6, 6)])

        def configure_optimizers(self):
            # The optimizer has the frozen base, too.
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

        def on_train_batch_start(self, batch, batch_idx):
            # This layer is trained for two steps, and frozen.
            self.net[4].requires_grad_(self.global_step < 2)

    def go(steps, **options):
        return fit(module=Headed(), saved=tmp_path, kind=AdapterCheckpoint, max_steps=steps, **options)[0]

    first = go(4)
    names = set(stored(tmp_path, 4)["state_dict"])
    assert {"net.3.weight", "net.4.weight"} <= names
    assert not {"net.0.base.weight", "net.2.base.bias"} & names
    go(6, ckpt_path=tmp_path / "step=4.ckpt")
    again = Headed.load_from_checkpoint(tmp_path / "step=6.ckpt")
    assert torch.equal(again.net[4].weight, first.net[4].weight)
    assert not torch.equal(again.net[4].weight, Headed().net[4].weight)


# Lightning gives advice about small data.
@pytest.mark.filterwarnings("ignore")
def test_sigterm_in_a_validation_ends_the_run_after_the_next_step(run, whole, regression, tmp_path):
    """And a resume comes to equal bits; see also the killed runs of tests/app/runs."""
    seen = []

    class Told(regression[0]):
        def validation_step(self, batch, batch_idx):
            seen.append(batch_idx)
            if len(seen) == 5:
                os.kill(os.getpid(), signal.SIGTERM)
            super().validation_step(batch, batch_idx)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SIGTERMException):
        run(tmp_path, module=Told())
    assert signal.getsignal(signal.SIGTERM) is before
    # The third validation, after step 15, is complete.
    assert len(seen) == 6
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 16
    assert_same(run(tmp_path, ckpt_path=tmp_path / "last.ckpt"), whole[1])


def test_sigterm_waits_for_all_batches_of_a_step(fit, regression, tmp_path):
    class Told(regression[0]):
        def training_step(self, batch, batch_idx):
            if batch_idx == 4:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().training_step(batch, batch_idx)

    with pytest.raises(SIGTERMException):
        fit(module=Told(), saved=tmp_path, kind=AdapterCheckpoint, accumulate_grad_batches=2)
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 3
