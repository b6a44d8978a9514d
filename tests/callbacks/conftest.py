"""Comparing what runs come to."""

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
