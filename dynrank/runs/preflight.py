"""Checks before a run starts, for faults that would otherwise appear late or with an unclear message."""

from collections.abc import Iterable, Mapping, Sequence
from inspect import signature
from typing import Annotated, Any

from lightning.pytorch import LightningModule, Trainer
from omegaconf import DictConfig
from pydantic import Field
from torch import Tensor

from dynrank.errors import ConfigurationError, Count, Positive, validated_call
from dynrank.layers.frozen_base import check_base, left_out
from dynrank.runs.config import plain
from dynrank.runs.overrides import unknown_key

# Parts that a checkpoint must have to resume from it.
_PARTS = {
    "state_dict": dict,
    "optimizer_states": list,
    "loops": dict,
    "callbacks": dict,
    "global_step": int,
    "pytorch-lightning_version": str,
}


def check_run(config: DictConfig) -> None:
    """Refuse values of the trainer."""
    trainer = plain(config.trainer)
    for name in sorted(trainer.keys() - signature(Trainer).parameters.keys()):
        raise ConfigurationError(unknown_key(f"trainer.{name}", config))
    _check_trainer(**trainer)


@validated_call("trainer")
def _check_trainer(
    *,
    max_steps: Annotated[int, Field(ge=-1)] = -1,
    accumulate_grad_batches: Count = 1,
    val_check_interval: Positive | None = None,
    devices: Any = 1,
    strategy: Any = "auto",
    **_: Any,
) -> None:
    """Refuse values that Lightning does not refuse before training."""
    if devices is None:
        raise ConfigurationError(
            "trainer.devices is null: trainer=slurm takes it from SLURM_NTASKS_PER_NODE, which is set in a job with "
            "--ntasks-per-node only; start dynrank-train by srun in such a job, or set trainer=ddp"
        )
    if isinstance(strategy, str) and any(way in strategy for way in ("spawn", "fork", "notebook")):
        raise ConfigurationError(
            f"trainer.strategy={strategy} does not return all results of its processes; set it to ddp"
        )


def check_metrics(monitors: Iterable[str], logged: Sequence[str], objective: str | None, final: Sequence[str]) -> None:
    """Refuse what the task never measures: a schedule's ``monitors`` in training, an ``objective`` at the end."""
    unknown = [name for name in monitors if name not in logged]
    if unknown:
        raise ConfigurationError(
            f"a schedule must watch a logged metric, got {unknown}; logged: {sorted(logged)}; "
            "set schedule.trigger.monitor or schedule.how.check_monitor"
        )
    if objective is not None and objective not in final:
        raise ConfigurationError(f"objective must be null or one of {sorted(final)}, got {objective!r}")


def check_checkpoint(config: DictConfig, checkpoint: Mapping[str, Any], module: LightningModule) -> None:
    """Refuse a checkpoint (read from ``config.ckpt_path``) that ``module`` cannot go on from; ranks may differ."""
    path = config.ckpt_path
    wrong = sorted(name for name, kind in _PARTS.items() if not isinstance(checkpoint.get(name), kind))
    if wrong:
        raise ConfigurationError(f"the checkpoint {path!r} lacks {wrong}, or holds something else there; set ckpt_path")
    stored = checkpoint["state_dict"]
    try:
        optimizer = checkpoint["hyper_parameters"]["optimizer"]["name"]
    except (KeyError, TypeError):
        optimizer = "unknown"
    if optimizer != config.optimizer.name:
        raise ConfigurationError(
            f"the checkpoint {path!r} was made with optimizer.name={optimizer}, the run has {config.optimizer.name}; "
            "set ckpt_path or optimizer"
        )
    mine = module.state_dict()
    absent = left_out(stored)
    shapes = {name: value.shape for name, value in stored.items() if isinstance(value, Tensor)}
    # bitsandbytes stores a packed weight under keys of its own beside the weight's.
    beside = tuple(f"{name}." for name in absent)
    wrong = sorted((shapes.keys() | absent) ^ {name for name in mine if not name.startswith(beside)})
    wrong += [k for k in shapes.keys() & mine.keys() if ".lora_" not in k and shapes[k] != mine[k].shape]
    if wrong:
        raise ConfigurationError(
            f"the checkpoint {path!r} is of another model: {wrong[:3]} differ; "
            "set ckpt_path, task or lora.target_modules"
        )
    check_base(module, stored)
