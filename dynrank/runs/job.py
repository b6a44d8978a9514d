"""One run from its composed configuration: build, train, test, export."""

import re
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningModule, seed_everything
from omegaconf import DictConfig, OmegaConf
from torch import nn

from dynrank.adapters.config import adapter_folder
from dynrank.adapters.load import start_from
from dynrank.adapters.read import open_adapter
from dynrank.callbacks import BestWeights, RankScheduler
from dynrank.callbacks.run_meter import RunMeter
from dynrank.driver.check import checked_metrics
from dynrank.errors import ConfigurationError, Count, configured, read_as
from dynrank.layers.finding import lora_layers
from dynrank.output.checkpoint_file import read_checkpoint
from dynrank.output.console import span
from dynrank.runs.config import check_run_keys, make, plain, rank_pattern
from dynrank.runs.export import export, held_bytes, summarise
from dynrank.runs.folder import METRICS, checkpoint_of, drop_rows_after, locked
from dynrank.runs.preflight import check_checkpoint, check_metrics, check_run
from dynrank.runs.stopping import stoppable
from dynrank.runs.summary import Summary
from dynrank.runs.trainer import add_to_metrics, check_loggers, finished, make_trainer, quiet_training
from dynrank.schedules.stage import check_schedule
from dynrank.tasks.data.splits import SPLITS
from dynrank.triggers import Run

VAL_LOSS = "val/loss"


@dataclass
class Job:
    """The objects of a run; the module's attribute ``model`` has LoRA layers."""

    task: Any
    module: LightningModule
    scheduler: RankScheduler


@configured()
def run(config: DictConfig, folder: Path, *, sweep: bool = False, record: Callable[[], None] | None = None) -> Summary:
    """Train, test and export into ``folder``; returns the contents of summary.json.

    With several processes, process 0 writes the files. With ``ckpt_path=last`` the interrupted run in ``folder`` is
    resumed. ``record`` is called by process 0 after all checks.
    """
    start = time.perf_counter()
    quiet_training()
    resumed = config.ckpt_path == "last"
    checkpoint = checkpoint_of(folder, config.ckpt_path)
    config.ckpt_path = str(checkpoint) if checkpoint is not None else None
    job = build(config)
    meter = RunMeter()
    best = BestWeights(*_judged_by(config.objective, job.task.metrics))
    trainer = make_trainer(config, folder, job.scheduler, meter, best, sweep=sweep)
    first = trainer.is_global_zero
    lock = locked(folder, resumed=resumed) if first else nullcontext()
    with finished(), lock, stoppable(trainer, checkpoint, folder):
        if first and record is not None:
            record()
        place = config.lora.get("from")
        if first and place is not None and checkpoint is None:
            ranks = span([layer.rank for _, layer in lora_layers(job.module)])
            print(f"goes on from     the adapter {place}, at rank {ranks}")
        if first and checkpoint is not None:
            step, ranks = _reached(checkpoint, job.module)
            print(f"goes on from     step {step} at rank {ranks}, {checkpoint}")
            if resumed:
                # There the n-th step has number n - 1.
                drop_rows_after(folder / METRICS, step)
                csv_logger: Any = trainer.loggers[0]
                add_to_metrics(folder, csv_logger)
        trainer.fit(job.module, job.task, ckpt_path=checkpoint)
        model: Any = job.module.model
        bytes_held = held_bytes(model, trainer.optimizers)
        weights = _choose_weights(job.module, best, config.export_weights, trainer.global_step)
        # The trainer returns one mapping for each data loader.
        tested = trainer.test(job.module, job.task, verbose=False)
        metrics = {name: value for of_loader in tested for name, value in of_loader.items()}
        seconds = time.perf_counter() - start
        # Only some tasks count their data.
        data = dict(getattr(job.task, "account", {}))
        # Only classifiers have classes.
        classes = dict(getattr(job.module, "class_results", {}))
        summary = summarise(model, job.scheduler.history, metrics, meter, bytes_held, seconds, data, weights, classes)
        if first:
            export(model, job.task, summary, folder, config, trainer.global_step)
    return summary


@configured()
def build(config: DictConfig, *, on_meta: bool = False) -> Job:
    """Make the objects of a run, cheap checks first; ``on_meta`` builds the model without its weights."""
    check_run_keys(config)
    lora = lora_arguments(config)
    # add_lora checks it, too, but only when the model is loaded.
    read_as(Count, plain(config.lora.rank), "lora.rank")
    check_run(config)
    check_loggers(config)
    steps = config.trainer.get("max_steps", -1)
    run = Run(steps if steps > 0 else None)
    scheduler = make_scheduler(config.schedule)
    check_schedule(scheduler.driver.stages, run)
    if config.plots and find_spec("matplotlib") is None:
        raise ConfigurationError("plots need matplotlib: pip install 'dynrank[plots]', or set plots=false")
    checkpoint = read_checkpoint(config.ckpt_path) if config.ckpt_path is not None else None
    seed_everything(config.seed, verbose=False)
    task = make_task(config, on_meta=on_meta)
    # A task of your own need not log what is measured.
    measured = checked_metrics(scheduler.driver.stages, measure=True)
    scheduler.driver.measure = config.trainer.get("limit_val_batches") != 0 and measured.keys() <= {*task.metrics}
    check_metrics(scheduler.driver.monitors, task.metrics, config.objective, task.final)
    module = task.module(lora, plain(config.optimizer), on_meta=on_meta)
    if config.lora.get("from") is not None and not on_meta:
        # The factors of a checkpoint replace these.
        start_from(module.model, adapter_folder(Path(config.lora["from"])))
    scheduler.driver.check_model(module.model, run)
    if checkpoint is not None and not on_meta:
        check_checkpoint(config, checkpoint, module)
    return Job(task, module, scheduler)


@configured()
def lora_arguments(config: DictConfig) -> dict[str, Any]:
    """The arguments of add_lora: the keys of ``lora`` and ``rank_map``, or the layers of the adapter ``lora.from``."""
    lora = {**plain(config.lora), "rank_map": rank_pattern(config.rank_map)}
    place = lora.pop("from", None)
    if place is not None:
        with open_adapter(adapter_folder(Path(place))) as adapter:
            # The name of a layer also matches a longer one that ends with it, so the longer one comes first.
            layers = sorted(adapter.layers.items(), key=lambda pair: -len(pair[0]))
        rules = {re.escape(name): {"rank": of.rank, "alpha": of.scaling * of.rank} for name, of in layers}
        lora |= {"target_modules": [name for name, _ in layers], "rank_map": rules}
    return lora


def make_task(config: DictConfig, *, on_meta: bool) -> Any:
    """The task of a run; with ``on_meta``, a task that :func:`lacks_data` gets two classes, to inspect its layers."""
    if on_meta and lacks_data(config):
        config = config.copy()
        OmegaConf.update(config, "data", dict.fromkeys(SPLITS, [["one", "one"], ["two", "two"]]), merge=False)
    return make(config.task, "task")


def lacks_data(config: DictConfig) -> bool:
    """Whether a required data.train is not set; layers depend on data only by the number of classes."""
    return OmegaConf.select(config, "data.train", default="") is None


def make_scheduler(node: DictConfig) -> RankScheduler:
    """The scheduler of a ``schedule`` node."""
    return RankScheduler(make(node, "schedule"))


def _judged_by(objective: str | None, logged: Sequence[str]) -> tuple[str, Literal["min", "max"]]:
    """The metric that says which validation was the best, and whether a smaller value is better."""
    monitor = objective if objective is not None and objective in logged and objective.startswith("val/") else VAL_LOSS
    return monitor, "min" if monitor.endswith(("loss", "perplexity")) else "max"


def _choose_weights(module: nn.Module, best: BestWeights, choice: str, last_step: int) -> str:
    """Put the weights that ``export_weights`` chooses into ``module``; returns which they are."""
    if choice == "last":
        return f"of the last step, {last_step:,} (export_weights=last)"
    if best.step is None:
        return f"of the last step, {last_step:,}: no validation after the last change of ranks logged {best.monitor}"
    best.restore(module)
    return f"of step {best.step:,} of {last_step:,}: the best {best.monitor} since the last change, {best.value:.4g}"


def _reached(checkpoint: Path, module: nn.Module) -> tuple[int, str]:
    """The step of a checkpoint of ``module``, and the lowest and the highest rank of its LoRA layers."""
    saved = read_checkpoint(checkpoint)
    experts = {layer.lora_A: layer.num_products for _, layer in lora_layers(module)}
    state = saved["state_dict"]
    ranks = [len(state[name]) // experts[p] for name, p in module.named_parameters() if p in experts and name in state]
    return saved["global_step"], span(ranks)
