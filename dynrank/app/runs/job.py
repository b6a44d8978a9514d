"""One run from its composed configuration: check, build, train, test, export."""

import re
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from importlib.util import find_spec
from math import inf
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, seed_everything
from omegaconf import DictConfig, OmegaConf
from torch import nn

from dynrank.adapters.base import base_of
from dynrank.adapters.folder import adapter_folder
from dynrank.adapters.load import start_from
from dynrank.adapters.read import Adapter, read_adapter
from dynrank.app.console import print_facts
from dynrank.app.keys import names_keys
from dynrank.app.runs.config import check_run_keys, make, plain, rank_pattern
from dynrank.app.runs.export import export, summarise
from dynrank.app.runs.folder import CONFIG, METRICS, checkpoint_of, locked
from dynrank.app.runs.run_meter import RunMeter
from dynrank.app.runs.summary import Summary
from dynrank.app.runs.trainer import log_again, make_trainer, quiet_training, stoppable
from dynrank.app.tasks.data.splits import SPLITS
from dynrank.callbacks import BestWeights, RankScheduler
from dynrank.driver.checks import check_model
from dynrank.driver.metrics import judging_metrics
from dynrank.errors import ConfigurationError, shown
from dynrank.layers.finding import lora_layers
from dynrank.output.checkpoint_file import read_checkpoint
from dynrank.output.console import span
from dynrank.schedules.stage import Stage, check_schedule
from dynrank.triggers import Run

# How the names of metrics end whose smaller values are better.
LOWER_IS_BETTER = ("loss", "perplexity", "error", "mse", "mae", "wer", "cer")


@dataclass
class Job:
    """The objects of a run; the module's attribute ``model`` has LoRA layers, and goes on from ``adapter``, if any."""

    task: Any
    module: LightningModule
    scheduler: RankScheduler
    adapter: Adapter | None


@names_keys
def run(config: DictConfig, folder: Path, *, sweep: bool = False, record: Callable[[], None] | None = None) -> Summary:
    """Train, test and export into ``folder``; returns the contents of summary.json.

    With several processes, process 0 writes the files. With ``ckpt_path=last`` the interrupted run in ``folder`` is
    resumed. ``config`` is written into the folder and not changed; ``record`` then writes more, if it is given.
    """
    start = time.perf_counter()
    quiet_training()
    given = config
    config = config.copy()
    resumed = config.ckpt_path == "last"
    checkpoint = checkpoint_of(folder, config.ckpt_path)
    config.ckpt_path = str(checkpoint) if checkpoint is not None else None
    job = build(config)
    meter = RunMeter()
    judged = config.objective if config.objective in {*job.task.metrics} - {"train/loss"} else "val/loss"
    best = BestWeights(judged, "min" if judged.endswith(LOWER_IS_BETTER) else "max")
    trainer = make_trainer(config, folder, job.scheduler, meter, best, sweep=sweep)
    first = trainer.is_global_zero
    lock = locked(folder, resumed=resumed) if first else nullcontext()
    with lock, stoppable(trainer, folder):
        if first:
            (folder / CONFIG).parent.mkdir(exist_ok=True)
            OmegaConf.save(given, folder / CONFIG)
            if record is not None:
                record()
            _start(config, job, trainer.loggers[0], folder if resumed else None)
        trainer.fit(job.module, job.task, ckpt_path=checkpoint)
        if config.export_weights == "best" and best.misses(trainer):
            # The run was killed in the validation after its last step.
            trainer.validate(job.module, job.task, verbose=False)
        model: Any = job.module.model
        weights = _choose_weights(job.module, best, config.export_weights, trainer.global_step)
        # The trainer returns one mapping for each data loader.
        tested = trainer.test(job.module, job.task, verbose=False)
        metrics = {name: value for of_loader in tested for name, value in of_loader.items()}
        others: dict[str, Any] = {"seconds": time.perf_counter() - start, "tokens_per_second": meter.tokens_per_second}
        # Only some tasks count their data.
        others |= {"steps": trainer.global_step, "weights": weights, "data": getattr(job.task, "account", {})}
        summary = summarise(model, job.scheduler.history, metrics, **others)
        # All processes hold a part of a base that is sharded.
        base = base_of(model)
        if first:
            export(model, job.task, summary, folder, config, base)
    return summary


def _start(config: DictConfig, job: Job, csv_logger: Any, resumed: Path | None) -> None:
    """Say from where the run goes on; ``resumed`` is its folder if a run that was interrupted there goes on."""
    if config.ckpt_path is not None:
        step = read_checkpoint(config.ckpt_path)["global_step"]
        print_facts({"goes on from": f"step {step}, {config.ckpt_path}"})
        if resumed is not None:
            # There the n-th step has number n - 1.
            log_again(resumed / METRICS, step, csv_logger)
    elif job.adapter is not None:
        ranks = span([layer.rank for _, layer in lora_layers(job.module)])
        schedule = config.schedule._target_.rpartition(".")[2]
        print_facts({"goes on from": f"the adapter {config.lora['from']}, at rank {ranks}; schedule={schedule}"})


@names_keys
def build(config: DictConfig, *, on_meta: bool = False) -> Job:
    """Make the objects of a run, cheap checks first; ``on_meta`` builds the model without its weights."""
    check_run_keys(config)
    adapter = adapter_of(config)
    lora = lora_arguments(config, adapter)
    run = Run(config.trainer.max_steps if config.trainer.max_steps > 0 else None)
    scheduler = make_scheduler(config.schedule)
    check_schedule(scheduler.driver.stages, run)
    if config.plots and find_spec("matplotlib") is None:
        raise ConfigurationError("plots need matplotlib: pip install 'dynrank[plots]', or set plots=false")
    checkpoint = read_checkpoint(config.ckpt_path) if config.ckpt_path is not None else None
    seed_everything(config.seed, verbose=False)
    task = make_task(config, on_meta=on_meta)
    # A change is measured by two validations: not each of many. A task of your own need not log what is measured.
    stages = [_measured(stage) for stage in scheduler.driver.stages]
    is_logged = judging_metrics(stages) <= {*task.metrics}
    if config.trainer.get("limit_val_batches") != 0 and is_logged and len(stages) <= 2:
        scheduler.driver.stages = stages
    if config.objective not in (None, *task.final):
        raise ConfigurationError(f"objective must be null or one of {sorted(task.final)}, got {config.objective!r}")
    # A task of your own need not take anything over, and a task without data has no classes.
    if adapter is not None and hasattr(task, "go_on_from") and not (on_meta and lacks_data(config)):
        task.go_on_from(Path(adapter.source))
    module = task.module(lora, plain(config.optimizer), on_meta=on_meta)
    if adapter is not None and not on_meta:
        # The factors of a checkpoint replace these.
        start_from(module.model, adapter)
    check_model(module.model, scheduler.driver.stages, run, scheduler.driver.rules)
    if checkpoint is not None and not on_meta:
        _check_checkpoint(config, checkpoint, module)
    return Job(task, module, scheduler, adapter)


def adapter_of(config: DictConfig) -> Adapter | None:
    """The adapter ``lora.from``, from which training goes on."""
    place = config.lora.get("from")
    return None if place is None else read_adapter(adapter_folder(Path(place)))


def lora_arguments(config: DictConfig, adapter: Adapter | None) -> dict[str, Any]:
    """The arguments of add_lora: the keys of ``lora`` and ``rank_map``, or the layers of the ``adapter``."""
    lora = {**plain(config.lora), "rank_map": rank_pattern(config.rank_map)}
    del lora["from"]
    if adapter is not None:
        # The name of a layer also matches a longer one that ends with it, so the longer one comes first.
        layers = sorted(adapter.layers.items(), key=lambda pair: -len(pair[0]))
        rules = {re.escape(name): {"rank": of.rank, "alpha": of.scaling * of.rank} for name, of in layers}
        lora |= {"target_modules": [name for name, _ in layers], "rank_map": rules}
    return lora


def make_task(config: DictConfig, *, on_meta: bool) -> Any:
    """The task of a run; with ``on_meta``, a task that :func:`lacks_data` gets two classes, to inspect its layers."""
    if on_meta and lacks_data(config):
        config = config.copy()
        two = [{"text": name, "label": name} for name in ("one", "two")]
        OmegaConf.update(config, "data", dict.fromkeys(SPLITS, two), merge=False)
    return make(config.task, "task")


def lacks_data(config: DictConfig) -> bool:
    """Whether a required data.train is not set; layers depend on data only by the number of classes."""
    return OmegaConf.select(config, "data.train", default="") is None


def make_scheduler(node: DictConfig) -> RankScheduler:
    """The scheduler of a ``schedule`` node."""
    return RankScheduler(make(node, "schedule"))


def _measured(stage: Stage) -> Stage:
    """The stage, whose change is at least measured."""
    unchecked = stage.how.max_regression is None
    return replace(stage, how=replace(stage.how, max_regression=inf)) if unchecked else stage


def _choose_weights(module: nn.Module, best: BestWeights, choice: str, last_step: int) -> str:
    """Put the weights that ``export_weights`` chooses into ``module``; returns which they are."""
    if choice == "last":
        return f"of the last step, {last_step:,} (export_weights=last)"
    if best.step is None:
        return f"of the last step, {last_step:,}: {best.why_none}"
    best.restore(module)
    return f"of step {best.step:,} of {last_step:,}: the best {best.monitor} since the last change, {best.value:.4g}"


def _check_checkpoint(config: DictConfig, checkpoint: Mapping[str, Any], module: LightningModule) -> None:
    """Refuse a checkpoint (read from ``config.ckpt_path``) that would mean something else in ``module``."""
    of_another = f"the checkpoint {config.ckpt_path!r} is of another run"
    lacking = sorted({"optimizer_states", "loops", "callbacks"} - checkpoint.keys())
    # Ranks may differ.
    differ = sorted(name for name in checkpoint["state_dict"].keys() ^ module.state_dict() if ".lora_" in name)
    if lacking or differ:
        what = f"it lacks {lacking}" if lacking else f"{differ[:3]} differ"
        raise ConfigurationError(f"{of_another}: {what}; set ckpt_path, task or lora.target_modules")
    # A module of your own need not save its arguments, and only a classifier has labels.
    before = dict(checkpoint.get("hyper_parameters") or {})
    before["optimizer.name"] = dict(before.get("optimizer") or {}).get("name")
    now = {**module.hparams, "optimizer.name": config.optimizer.name}
    # As many of other classes would fit the head by their shape.
    for name in ("optimizer.name", "labels"):
        if before.get(name) is not None and before[name] != now.get(name):
            raise ConfigurationError(
                f"{of_another}: {name} is {shown(before[name])} there, and {shown(now.get(name))} here; set ckpt_path, "
                "optimizer or data"
            )
