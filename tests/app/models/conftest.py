"""The command ``dynrank`` in tests of models."""

from functools import partial

import pytest

from dynrank.app.commands import cli


@pytest.fixture
def launch(launch):
    """Run ``dynrank`` with these arguments in this process: (exit code, what it printed, what it said of errors)."""
    return partial(launch, cli.main)
