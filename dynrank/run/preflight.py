"""What is refused before a run starts, because it would fail late or in the words of others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lightning.pytorch import LightningModule
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from dynrank.errors import ConfigurationError
from dynrank.layers.frozen_base import check_base, left_out


def check_run(config: DictConfig) -> None:
    """Refuse values of the run and the trainer.

    Raises:
        ConfigurationError: naming the value and its key.
    """
    leasts = {"lora.rank": 1, "seed": 0, "checkpoint_every": 1, "trainer.accumulate_grad_batches": 1}
    for key, least in leasts.items():
        value = OmegaConf.select(config, key)
        if not isinstance(value, int) or value < least:
            raise ConfigurationError(f"{key} must be an int of at least {least}, got {value!r}")
    if config.seed >= 2**32:  # NumPy's generator takes no more
        raise ConfigurationError(f"seed must be below 2**32, got {config.seed}")
    steps = config.trainer.get("max_steps", -1)
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < -1:
        raise ConfigurationError(f"trainer.max_steps must be an int of at least 0, or -1 (no end), got {steps!r}")
    if config.trainer.get("devices", 1) is None:
        raise ConfigurationError(
            "trainer.devices is null: trainer=slurm takes it from SLURM_NTASKS_PER_NODE, which is set in a job with "
            "--ntasks-per-node only; start dynrank-train by srun in such a job, or set trainer=ddp"
        )
    strategy = config.trainer.get("strategy", "auto")
    if isinstance(strategy, str) and any(way in strategy for way in ("spawn", "fork", "notebook")):
        raise ConfigurationError(
            f"trainer.strategy={strategy} trains in processes whose results do not all come back; set it to ddp"
        )
    fsdp2 = isinstance(strategy, DictConfig) and str(strategy.get("_target_")).endswith(".ModelParallelStrategy")
    if fsdp2 and strategy.get("save_distributed_checkpoint", True):
        raise ConfigurationError(
            "trainer.strategy.save_distributed_checkpoint=true writes folders with pickled parts, which ckpt_path does "
            "not take; set it to false"
        )
    interval = config.trainer.get("val_check_interval", 1.0)
    if not isinstance(interval, int | float) or interval <= 0:
        raise ConfigurationError(f"trainer.val_check_interval must be a number above 0, got {interval!r}")


def check_monitors(monitors: Iterable[str], logged: Sequence[str]) -> None:
    """Refuse names that the task never logs.

    Raises:
        ConfigurationError: naming them and what is logged.
    """
    unknown = [name for name in monitors if name not in logged]
    if unknown:
        raise ConfigurationError(
            f"a schedule must watch a logged metric, got {unknown}; logged: {sorted(logged)}; "
            "set schedule.trigger.monitor or schedule.check_monitor"
        )


def check_objective(name: str | None, measured: Sequence[str]) -> None:
    """Refuse a name that the task does not measure at the final weights.

    Raises:
        ConfigurationError: naming it and what is measured.
    """
    if name is not None and name not in measured:
        raise ConfigurationError(f"objective must be null or one of {sorted(measured)}, got {name!r}")


def check_checkpoint(config: DictConfig, checkpoint: Mapping[str, Any], module: LightningModule) -> None:
    """Refuse a checkpoint (read from ``config.ckpt_path``) that ``module`` cannot go on from; ranks may differ.

    Raises:
        ConfigurationError: if it comes from another model, base or optimizer.
    """
    path, stored = config.ckpt_path, checkpoint["state_dict"]
    try:
        optimizer = checkpoint["hyper_parameters"]["optimizer"]["name"]
    except (KeyError, TypeError):
        optimizer = "unknown"
    missing = {"optimizer_states", "loops", "callbacks", "pytorch-lightning_version"} - checkpoint.keys()
    if missing or optimizer != config.optimizer.name:
        raise ConfigurationError(
            f"the checkpoint {path!r} lacks {sorted(missing)} or was made with optimizer.name={optimizer}; "
            "set ckpt_path or optimizer"
        )
    mine, absent = module.state_dict(), left_out(stored)
    shapes = {name: value.shape for name, value in stored.items() if isinstance(value, Tensor)}
    wrong = sorted((shapes.keys() | absent) ^ mine.keys())
    wrong += [k for k in shapes.keys() & mine.keys() if ".lora_" not in k and shapes[k] != mine[k].shape]
    if wrong:
        raise ConfigurationError(
            f"the checkpoint {path!r} is of another model: {wrong[:3]} differ; "
            "set ckpt_path, task or lora.target_modules"
        )
    check_base(module, stored)
