"""One run from its composed configuration: build, train, test, export."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import transformers
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException
from omegaconf import DictConfig, OmegaConf

from dynrank.adapters.save import save_adapter
from dynrank.callbacks import (
    AdapterCheckpoint,
    RankMonitor,
    RankProgressBar,
    RankScheduler,
    RunMeter,
    ScheduleFreeMode,
    StepSeed,
)
from dynrank.errors import ConfigurationError
from dynrank.layers.finding import lora_layers
from dynrank.output.checkpoint_file import read_checkpoint
from dynrank.run.config import plain, rank_pattern
from dynrank.run.folder import checkpoint_of, claim, join, take_up
from dynrank.run.preflight import check_checkpoint, check_monitors, check_objective, check_run
from dynrank.run.report.page import write_report
from dynrank.run.report.summary import draw, final_rank_map, held_bytes, print_summary, summarise
from dynrank.run.trusted import make
from dynrank.schedules import How, check_schedule
from dynrank.triggers import Run


@dataclass
class Job:
    """What a configuration stands for: the task, its module with LoRA layers in place, and the schedule."""

    task: Any
    module: LightningModule
    scheduler: RankScheduler


def build(config: DictConfig, *, on_meta: bool = False) -> Job:
    """Make the objects of a run, cheap checks first; ``on_meta`` builds the model without its weights.

    Raises:
        ConfigurationError: if any value cannot be used.
    """
    pattern = rank_pattern(config.rank_map)
    check_run(config)
    run = Run(config.trainer.get("max_steps", -1) if config.trainer.get("max_steps", -1) > 0 else None)
    scheduler = make_scheduler(config.schedule, config.check_processes_every)
    ranks = [config.lora.rank, *(rule["rank"] for rule in pattern.values() if rule.get("rank") and not rule["pinned"])]
    check_schedule(scheduler.driver.stages, highest=max(ranks), run=run)
    if config.plots and find_spec("matplotlib") is None:
        raise ConfigurationError("plots need matplotlib: pip install 'dynrank[plots]', or set plots=false")
    checkpoint = read_checkpoint(config.ckpt_path) if config.ckpt_path is not None else None
    seed_everything(config.seed, verbose=False)
    task = make(config.task, "task")
    lora = {**plain(config.lora), "rank_map": pattern}
    check_monitors(scheduler.driver.monitors, task.metrics)
    check_objective(config.objective, task.final)
    module = task.module(lora, plain(config.optimizer), on_meta=True)  # what can be refused is, before weights load
    scheduler.driver.check_model(module.model, run)
    if not on_meta:
        module = task.module(lora, plain(config.optimizer))
        if checkpoint is not None:
            check_checkpoint(config, checkpoint, module)
    return Job(task, module, scheduler)


def make_scheduler(node: DictConfig, check_every: int | None = None) -> RankScheduler:
    """The scheduler of a ``schedule`` node: keys of :class:`How` apply to all stages, the rest makes the stages.

    ``check_every`` is that of :class:`RankScheduler`.

    Raises:
        ConfigurationError: if a value cannot be used.
    """
    values = plain(node) or {}  # interpolations are resolved while the node still hangs in its configuration
    how = {field.name: values.pop(field.name) for field in fields(How) if field.name in values}
    return RankScheduler(make(OmegaConf.create(values), "schedule"), How(**how), check_every=check_every)


def run(
    config: DictConfig, folder: Path, *, sweep: bool = False, record: Callable[[], None] | None = None
) -> dict[str, Any]:
    """Train, test and export into ``folder``; returns the contents of summary.json.

    Of several processes the first one writes the files, and calls ``record`` once nothing is refused any more. With
    ``ckpt_path=last`` the interrupted run in ``folder`` goes on there.

    Raises:
        ConfigurationError: if any value cannot be used, ``folder`` holds a run already, or this is one job of a
            ``sweep`` and of several processes: each of these would do the whole sweep.
    """
    start = time.perf_counter()
    _quiet()
    checkpoint = checkpoint_of(folder, config.ckpt_path)
    goes_on, config.ckpt_path = config.ckpt_path == "last", str(checkpoint) if checkpoint is not None else None
    job, meter = build(config), RunMeter()
    trainer = _trainer(config, folder, job, meter)
    if sweep and trainer.world_size > 1 and os.environ.get("SUBMITIT_EXECUTOR") != "slurm":  # a SLURM job for each run
        raise ConfigurationError(
            f"--multirun cannot make a run of {trainer.world_size} processes: each would do the whole sweep; set "
            "trainer.devices=1, make one run after the other without --multirun, or set hydra/launcher=submitit_slurm"
        )
    job.scheduler.check_trainer(trainer)  # the scheduler does so, too, when the other processes have been started
    if trainer.is_global_zero:
        if checkpoint is not None and goes_on:
            take_up(folder, read_checkpoint(checkpoint)["global_step"])
        else:
            claim(folder)
        if record is not None:
            record()
    model: Any = job.module.model
    ranks_at_start = {name: layer.rank for name, layer in lora_layers(model)}
    try:
        trainer.fit(job.module, job.task, ckpt_path=config.ckpt_path)
    except SIGTERMException:
        if trainer.is_global_zero:
            saved = trainer.checkpoint_callback._last_checkpoint_saved or config.ckpt_path  # type: ignore[union-attr]
            print(f"SIGTERM: stopped after step {trainer.global_step}; go on with ckpt_path={saved}", file=sys.stderr)
        raise
    except (KeyError, IndexError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        if checkpoint is None or meter.begun or isinstance(error, ConfigurationError):
            raise
        raise ConfigurationError(  # Lightning and torch load states without looking at what is in them
            f"cannot go on from the checkpoint {str(checkpoint)!r}: {type(error).__name__}: {error!s:.200}; "
            "set ckpt_path"
        ) from error
    if trainer.interrupted:
        raise KeyboardInterrupt
    held = held_bytes(model, trainer.optimizers)
    tested = trainer.test(job.module, job.task, verbose=False)  # one mapping for each loader
    metrics = {name: value for of_loader in tested for name, value in of_loader.items()}
    history = job.scheduler.history
    summary = summarise(model, history, metrics, meter, held, time.perf_counter() - start)
    if not trainer.is_global_zero:
        return summary
    join(folder)
    save_adapter(model, folder / "adapter")
    (folder / "final_ranks.yaml").write_text(final_rank_map(model, config.lora.rslora), encoding="utf-8")
    if config.plots:
        draw(model, history, ranks_at_start, folder)
    part = folder / "summary.json.part"
    part.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    os.replace(part, folder / "summary.json")
    report = write_report(folder, OmegaConf.to_yaml(config)) if config.plots else None
    print_summary(summary, folder, report)
    return summary


def _quiet() -> None:
    """Silence what others print of every run and that tells a user nothing."""
    transformers.logging.set_verbosity_error()  # "classifier newly initialized": it is meant to be
    transformers.logging.disable_progress_bar()
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", "Experiment logs directory .* exists")  # it holds .hydra; an old run is refused
    warnings.filterwarnings("ignore", "The dirpath has changed")  # a run goes on in a folder of its own
    warnings.filterwarnings("ignore", r".isinstance\(treespec, LeafSpec\)", FutureWarning)  # lightning on torch 2.13
    warnings.filterwarnings("ignore", "The '.*_dataloader' does not have many workers")  # batches are ready in memory


def _trainer(config: DictConfig, folder: Path, job: Job, meter: RunMeter) -> Trainer:
    monitor = RankMonitor(
        folder / "rank_history.csv", model_name="model", prediction_file=folder / "rank_predictions.csv"
    )
    callbacks: list[Any] = [ScheduleFreeMode(), job.scheduler, StepSeed(config.seed), meter, monitor]
    if config.trainer.enable_progress_bar:
        callbacks.append(RankProgressBar())
    callbacks.append(
        AdapterCheckpoint(
            folder / "checkpoints",
            filename="last",
            every_n_train_steps=config.checkpoint_every,
            save_top_k=1,
            enable_version_counter=False,
        )
    )
    loggers = [CSVLogger(str(folder), name="", version="")]
    loggers += [make(node, f"logger.{name}") for name, node in (config.logger or {}).items()]
    options = plain(config.trainer)
    if isinstance(config.trainer.strategy, DictConfig):
        options["strategy"] = make(config.trainer.strategy, "trainer.strategy")
    try:
        return Trainer(
            **options,
            default_root_dir=folder,
            callbacks=callbacks,
            logger=loggers,
            enable_model_summary=False,
        )
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"lightning.Trainer does not take these values: {error}; set trainer") from error
