"""Runs in Lightning: one way to make them, and to compare what comes of them."""

import pytest
import torch
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint

from dynrank.callbacks import StepSeed


@pytest.fixture(scope="session")
def fit(regression):
    """Trains 24 steps with these callbacks, and validates after every fifth; returns (module, trainer).

    Where ``saved`` is a folder, a callback of class ``kind`` leaves step=N.ckpt there after every step.
    """
    make, data, trainer = regression

    def run(*callbacks, module=None, saved=None, kind=ModelCheckpoint, ckpt_path=None, **options):
        callbacks = [*callbacks, StepSeed(0)]
        module = module or make()
        if saved is not None:
            every = {"every_n_train_steps": 1, "save_top_k": -1, "save_on_train_epoch_end": False}
            callbacks.append(kind(saved, filename="{step}", **every))
        options = {"max_steps": 24, "val_check_interval": 5, "num_sanity_val_steps": 0, **options}
        saves = any(isinstance(callback, Checkpoint) for callback in callbacks)
        fitted = trainer(callbacks=callbacks, enable_checkpointing=saves, **options)
        fitted.fit(module, *data(), ckpt_path=ckpt_path)
        return module, fitted

    return run


@pytest.fixture(scope="session")
def assert_same():
    """Checks that two modules hold exactly the same values."""

    def check(module, other, said=""):
        expected = other.state_dict()
        for name, value in module.state_dict().items():
            assert torch.equal(value, expected[name]), (said, name)

    return check


@pytest.fixture
def wandb_run(tmp_path):
    """(an offline run of Weights & Biases, a function that ends it and returns the rows that it has stored)."""
    # wandb loads slowly, and few tests need it.
    import wandb
    from wandb_files import history

    run = wandb.init(dir=tmp_path, mode="offline", settings=wandb.Settings(silent=True))

    def read():
        run.finish()
        return history(tmp_path)

    yield run, read
    run.finish()
