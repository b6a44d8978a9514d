import pytest

OPTIMIZER = {"name": "AdamW", "lr": 1e-3, "head_lr": 1e-3, "weight_decay": 0.0, "warmup_steps": 1, "decay": "linear"}


@pytest.fixture(scope="session")
def optimizer():
    """Arguments of make_optimizer."""
    return {**OPTIMIZER, "decay_share": 0.0, "options": {}}
