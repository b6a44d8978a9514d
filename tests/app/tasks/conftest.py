import datasets
import pytest


@pytest.fixture(scope="session")
def optimizer():
    """Arguments of make_optimizer."""
    return {"head_lr": 1e-3, "warmup_steps": 1, "decay": "linear"}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Where datasets keeps what it has read and made: nowhere of the user's."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"
