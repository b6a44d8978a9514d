import datasets
import pytest
import torch
from safetensors.torch import load_file

import dynrank
from dynrank.runs import job

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


@pytest.fixture
def whole_and_resumed(tmp_path):
    """Makes a run of 8 steps, one of ``steps``, and one that resumes the first up to ``steps``, with the same weights.

    Returns the summaries of the first two; the folders are tmp_path / first, whole and resumed.
    """

    def runs(options, steps):
        def run(name, *more):
            often = ["checkpoint_every=8", "trainer.val_check_interval=8"]
            quiet = ["trainer.enable_progress_bar=false", "plots=false"]
            summary = job.run(dynrank.compose([*options, *often, *quiet, *more]), tmp_path / name)
            return summary, load_file(tmp_path / name / "adapter" / "adapter_model.safetensors")

        first, _ = run("first", "trainer.max_steps=8")
        whole, adapter = run("whole", f"trainer.max_steps={steps}")
        checkpoint = tmp_path / "first" / "checkpoints" / "last.ckpt"
        _, resumed = run("resumed", f"trainer.max_steps={steps}", f"ckpt_path={checkpoint}")
        assert adapter.keys() == resumed.keys()
        assert all(torch.equal(factor, resumed[name]) for name, factor in adapter.items())
        return first, whole

    return runs
