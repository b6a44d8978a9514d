"""What is refused before a run starts, because it would fail late or in the words of others."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pickle import UnpicklingError

import torch
from lightning.pytorch import LightningModule
from omegaconf import DictConfig, OmegaConf

from dynrank.errors import ConfigurationError


def check_run(config: DictConfig) -> None:
    """Refuse values of the run and the trainer.

    Raises:
        ConfigurationError: naming the value and its key.
    """
    for key, least in (("seed", 0), ("checkpoint_every", 1), ("trainer.accumulate_grad_batches", 1)):
        value = OmegaConf.select(config, key)
        if not isinstance(value, int) or value < least:
            raise ConfigurationError(f"{key} must be an int of at least {least}, got {value!r}")
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


def check_checkpoint(config: DictConfig, module: LightningModule) -> None:
    """Refuse a checkpoint (``config.ckpt_path``) that ``module`` cannot go on from; ranks may differ.

    Raises:
        ConfigurationError: if it is broken, holds code, or comes from another model or optimizer.
    """
    path = config.ckpt_path
    try:
        checkpoint = torch.load(path, weights_only=True, mmap=True)
        stored, optimizer = checkpoint["state_dict"], checkpoint["hyper_parameters"]["optimizer"]["name"]
        shapes = {name: value.shape for name, value in stored.items()}
        missing = {"optimizer_states", "loops", "callbacks", "pytorch-lightning_version"} - checkpoint.keys()
    except OSError as error:
        raise ConfigurationError(f"cannot read the checkpoint {path!r}: {error.strerror}; set ckpt_path") from None
    except (RuntimeError, UnpicklingError, EOFError, KeyError, TypeError, AttributeError) as error:
        raise ConfigurationError(
            f"{path!r} is not a whole checkpoint of plain tensors: {error!s:.200}; set ckpt_path"
        ) from None
    mine = module.state_dict()
    wrong = sorted(shapes.keys() ^ mine.keys())
    wrong += [k for k in shapes.keys() & mine.keys() if ".lora_" not in k and shapes[k] != mine[k].shape]
    if missing or optimizer != config.optimizer.name:
        raise ConfigurationError(
            f"the checkpoint {path!r} lacks {sorted(missing)} or was made with optimizer.name={optimizer}; "
            "set ckpt_path or optimizer"
        )
    if wrong:
        raise ConfigurationError(
            f"the checkpoint {path!r} is of another model: {wrong[:3]} differ; "
            "set ckpt_path, task or lora.target_modules"
        )
