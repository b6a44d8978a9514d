"""One run from its composed configuration: build, train, test, export."""

from __future__ import annotations

import json
import logging
import os
import time
import warnings
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import transformers
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar
from lightning.pytorch.loggers import CSVLogger
from omegaconf import DictConfig

from dynrank.adapter import save_adapter
from dynrank.callbacks import RankMonitor, RankScheduler, RunMeter, ScheduleFreeMode, StepSeed
from dynrank.config import plain, rank_pattern
from dynrank.errors import ConfigurationError
from dynrank.layers.inject import lora_layers
from dynrank.preflight import check_checkpoint, check_run
from dynrank.report import draw, print_summary, summarise
from dynrank.trusted import make


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
    check_run(config)
    if config.plots and find_spec("matplotlib") is None:
        raise ConfigurationError("plots need matplotlib: pip install 'dynrank[plots]', or set plots=false")
    seed_everything(config.seed, verbose=False)
    task = make(config.task)
    lora = {**plain(config.lora), "rank_map": pattern}
    module = task.module(lora, plain(config.optimizer), on_meta=on_meta)
    if isinstance(scheduler, RankScheduler):
        scheduler.check_layers(module.model)
    if config.ckpt_path is not None and not on_meta:
        check_checkpoint(config, module)
    return Job(task, module, scheduler)


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
    history = job.scheduler.history if job.scheduler is not None else []
    summary = summarise(model, history, metrics, meter, time.perf_counter() - start)
    if config.plots:
        draw(model, history, ranks_at_start, folder)
    part = folder / "summary.json.part"
    part.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    os.replace(part, folder / "summary.json")
    print_summary(summary, folder)
    return summary


def _quiet() -> None:
    """Silence what others print of every run and that tells a user nothing."""
    transformers.logging.set_verbosity_error()  # "classifier newly initialized": it is meant to be
    transformers.logging.disable_progress_bar()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", "Experiment logs directory .* exists")  # it holds .hydra; an old run is refused
    warnings.filterwarnings("ignore", r".isinstance\(treespec, LeafSpec\)", FutureWarning)  # lightning on torch 2.13
    warnings.filterwarnings("ignore", "The '.*_dataloader' does not have many workers")  # batches are ready in memory


def _trainer(config: DictConfig, folder: Path, job: Job, meter: RunMeter) -> Trainer:
    callbacks: list[Any] = [StepSeed(config.seed), meter, RankMonitor(folder / "rank_history.csv", model_name="model")]
    if job.scheduler is not None:
        callbacks.insert(0, job.scheduler)
    callbacks.insert(0, ScheduleFreeMode())  # before what validates when training starts
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
