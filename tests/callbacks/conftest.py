"""Comparing what runs come to, and runs of Weights & Biases."""

import pytest
import torch


@pytest.fixture(scope="session")
def assert_same():
    """Checks that two modules hold exactly the same values."""

    def check(module, other, what=""):
        expected = other.state_dict()
        for name, value in module.state_dict().items():
            assert torch.equal(value, expected[name]), (what, name)

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
