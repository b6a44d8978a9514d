import datasets
import pytest

OPTIMIZER = {"name": "AdamW", "lr": 1e-3, "head_lr": 1e-3, "weight_decay": 0.0, "warmup_steps": 1, "decay": "linear"}


@pytest.fixture(scope="session")
def optimizer():
    """Arguments of make_optimizer."""
    return {**OPTIMIZER, "decay_share": 0.0, "options": {}}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Where datasets keeps what it has read and made: nowhere of the user's."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"
