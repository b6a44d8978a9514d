"""One run from its composed configuration: build, train, test, export, report."""

from __future__ import annotations

import json
import logging
import os
import time
import warnings
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import transformers
from hydra.utils import get_object, instantiate
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar
from lightning.pytorch.loggers import CSVLogger
from omegaconf import DictConfig, OmegaConf

from dynrank.adapter import save_adapter
from dynrank.callbacks import RankMonitor, RankScheduler, RunMeter, StepSeed
from dynrank.callbacks.run_meter import peak_memory_bytes
from dynrank.config import plain, rank_pattern
from dynrank.errors import ConfigurationError
from dynrank.layers.inject import lora_layers
from dynrank.linalg import singular_values

# What a configuration may name as _target_: a config file from elsewhere must not call into the system.
_TRUSTED = ("dynrank.", "lightning.", "torchmetrics.", "transformers.")


@dataclass
class Job:
    """What a configuration stands for: the task, its module with LoRA layers in place, and the schedule, if any."""

    task: Any
    module: LightningModule
    scheduler: RankScheduler | None


def build(config: DictConfig, *, on_meta: bool = False) -> Job:
    """Make the objects of a run, cheap checks first; ``on_meta`` builds the model without its weights.

    Raises:
        ConfigurationError: if any value cannot be used.
    """
    pattern = rank_pattern(config.rank_map)
    scheduler = make(config.schedule)
    _check_run(config)
    if config.plots and find_spec("matplotlib") is None:
        raise ConfigurationError("plots need matplotlib: pip install 'dynrank[plots]', or set plots=false")
    seed_everything(config.seed, verbose=False)
    task = make(config.task)
    lora = {**plain(config.lora), "rank_map": pattern}
    module = task.module(lora, plain(config.optimizer), on_meta=on_meta)
    if isinstance(scheduler, RankScheduler):
        scheduler.check_layers(module.model)
    if config.ckpt_path is not None and not on_meta:
        _check_checkpoint(config, module)
    return Job(task, module, scheduler)


def _check_run(config: DictConfig) -> None:
    """Refuse values of the run and the trainer that would fail late, or in words of others."""
    for key, least in (("seed", 0), ("checkpoint_every", 1), ("trainer.accumulate_grad_batches", 1)):
        value = OmegaConf.select(config, key)
        if not isinstance(value, int) or value < least:
            raise ConfigurationError(f"{key} must be an int of at least {least}, got {value!r}")
    if config.trainer.get("devices", 1) not in (1, "1"):
        raise ConfigurationError(f"a run is one process so far; set trainer.devices=1, got {config.trainer.devices}")
    interval = config.trainer.get("val_check_interval", 1.0)
    if not isinstance(interval, int | float) or interval <= 0:
        raise ConfigurationError(f"trainer.val_check_interval must be a number above 0, got {interval!r}")


def _check_checkpoint(config: DictConfig, module: LightningModule) -> None:
    """Refuse a checkpoint that is broken, holds code, or comes from another model or optimizer; ranks may differ."""
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


def run(config: DictConfig, folder: Path) -> dict[str, Any]:
    """Train, test and export into ``folder``; returns the contents of summary.json.

    Raises:
        ConfigurationError: if any value cannot be used, or ``folder`` holds a run already.
    """
    start = time.perf_counter()
    _quiet()
    job, meter = build(config), RunMeter()
    trainer = _trainer(config, folder, job, meter)
    try:
        (folder / "checkpoints").mkdir(parents=True)
    except FileExistsError:
        raise ConfigurationError(f"{str(folder)!r} holds a run already; set hydra.run.dir to a new folder") from None
    model: Any = job.module.model
    ranks_at_start = {name: layer.rank for name, layer in lora_layers(model)}
    trainer.fit(job.module, job.task.data, ckpt_path=config.ckpt_path)
    if trainer.interrupted:
        raise KeyboardInterrupt
    metrics = trainer.test(job.module, job.task.data, verbose=False)[0]
    save_adapter(model, folder / "adapter")
    summary = _summary(job, metrics, meter, time.perf_counter() - start)
    if config.plots:
        _plot(job, ranks_at_start, folder)
    part = folder / "summary.json.part"
    part.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    os.replace(part, folder / "summary.json")
    _print(summary, folder)
    return summary


def make(node: Any) -> Any:
    """Instantiate a configuration node whose ``_target_`` (and those below it) lie in trusted packages.

    Raises:
        ConfigurationError: if one does not.
    """
    if node is None or not node.get("_target_"):
        return None
    _check_targets(OmegaConf.to_container(node, resolve=True))
    return instantiate(node, _convert_="all")


def _check_targets(node: Any) -> None:
    if isinstance(node, dict):
        target = node.get("_target_")
        if target is not None:
            trusted = str(target).startswith(_TRUSTED)
            # a path may lead through what a trusted module imports, so the object's own home counts too
            if not trusted or not f"{getattr(get_object(str(target)), '__module__', '')}.".startswith(_TRUSTED):
                raise ConfigurationError(f"_target_ must lie in one of {_TRUSTED}, got {target!r}")
        node = list(node.values())
    if isinstance(node, list):
        for child in node:
            _check_targets(child)


def _quiet() -> None:
    """Silence what others print of every run and that tells a user nothing."""
    transformers.logging.set_verbosity_error()  # "classifier newly initialized": it is meant to be
    transformers.logging.disable_progress_bar()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", "Experiment logs directory .* exists")  # it holds .hydra; an old run is refused
    warnings.filterwarnings(
        "ignore", r".isinstance\(treespec, LeafSpec\)", FutureWarning
    )  # lightning 2.6 on torch 2.13
    warnings.filterwarnings("ignore", "The '.*_dataloader' does not have many workers")  # batches are ready in memory


def _trainer(config: DictConfig, folder: Path, job: Job, meter: RunMeter) -> Trainer:
    callbacks: list[Any] = [StepSeed(config.seed), meter, RankMonitor(folder / "rank_history.csv", model_name="model")]
    if job.scheduler is not None:
        callbacks.insert(0, job.scheduler)
    if config.trainer.enable_progress_bar:
        callbacks.append(RichProgressBar())
    callbacks.append(
        ModelCheckpoint(
            folder / "checkpoints",
            filename="last",
            every_n_train_steps=config.checkpoint_every,
            save_top_k=1,
            enable_version_counter=False,
        )
    )
    loggers = [CSVLogger(str(folder), name="", version="")]
    loggers += [make(node) for node in (config.logger or {}).values()]
    try:
        return Trainer(
            **plain(config.trainer),
            default_root_dir=folder,
            callbacks=callbacks,
            logger=loggers,
            enable_model_summary=False,
        )
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"lightning.Trainer does not take these values: {error}; set trainer") from error


def _summary(job: Job, metrics: Any, meter: RunMeter, seconds: float) -> dict[str, Any]:
    model: Any = job.module.model
    layers = dict(lora_layers(model))
    history = job.scheduler.history if job.scheduler is not None else []
    return {
        "test": {name: float(value) for name, value in metrics.items()},
        "final_ranks": {name: layer.rank for name, layer in layers.items()},
        "changes": [{"step": event.step, "reason": event.reason} for event in history],
        "parameters": {
            "adapter": sum(layer.lora_A.numel() + layer.lora_B.numel() for layer in layers.values()),
            "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "total": sum(p.numel() for p in model.parameters()),
        },
        "seconds": seconds,
        "tokens_per_second": meter.tokens_per_second,
        "peak_memory_bytes": peak_memory_bytes(),
    }


def _plot(job: Job, ranks_at_start: dict[str, int], folder: Path) -> None:
    from dynrank.plots import plot_loss, plot_ranks, plot_spectra  # matplotlib is an extra

    plots = folder / "plots"
    plots.mkdir()
    model: Any = job.module.model
    layers = dict(lora_layers(model))
    history = job.scheduler.history if job.scheduler is not None else []
    ranks = {name: layer.rank for name, layer in layers.items()}
    changes = {e.step: f"rank {_ranks(e.layers, 'rank_before')} → {_ranks(e.layers, 'rank_after')}" for e in history}
    plot_loss(folder / "metrics.csv", changes, plots / "loss.png")
    plot_ranks(ranks_at_start, ranks, plots / "ranks.png")
    if history:
        spectra = {report.layer: report.singular_values for report in history[0].layers}
        kept = {report.layer: report.rank_after for report in history[0].layers}
        plot_spectra(spectra, kept, f"before the change at step {history[0].step}", plots / "spectra.png")
    else:
        spectra = {n: tuple((singular_values(la.lora_B, la.lora_A) * la.scaling).tolist()) for n, la in layers.items()}
        plot_spectra(spectra, ranks, "at the end", plots / "spectra.png")


def _ranks(layers: Any, field: str) -> str:
    return "/".join(str(rank) for rank in sorted({getattr(layer, field) for layer in layers}))


def _print(summary: dict[str, Any], folder: Path) -> None:
    rows = {name: f"{value:.4f}" for name, value in summary["test"].items()}
    rows["final rank"] = ", ".join(str(rank) for rank in sorted(set(summary["final_ranks"].values())))
    rows["parameters"] = "{adapter:,} in the adapter, {trainable:,} trained".format(**summary["parameters"])
    rows["time"] = "{seconds:.0f} s, {tokens_per_second:.0f} tokens/s in training".format(**summary)
    rows["peak memory"] = f"{summary['peak_memory_bytes'] / 2**20:.0f} MiB"
    rows["files"] = str(folder)
    for name, text in rows.items():
        print(f"{name:<16} {text}")
