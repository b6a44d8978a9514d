"""One run from its composed configuration: check, build, train, test, export."""

import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from importlib.util import find_spec
from math import inf
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningModule, seed_everything
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from dynrank.adapters.base import base_of
from dynrank.adapters.folder import adapter_folder
from dynrank.adapters.load import start_from
from dynrank.adapters.read import Adapter, read_adapter
from dynrank.app.console import print_facts
from dynrank.app.keys import keys_of, named, names_keys
from dynrank.app.runs.config import better, check_run_keys, make, plain, rank_pattern
from dynrank.app.runs.export import export, summarise
from dynrank.app.runs.folder import CONFIG, METRICS, checkpoint_of, locked
from dynrank.app.runs.going_on import start_facts
from dynrank.app.runs.run_meter import RunMeter
from dynrank.app.runs.summary import Summary
from dynrank.app.runs.trainer import finished, log_again, make_trainer, quiet_training, stoppable
from dynrank.app.tasks.data.splits import SPLITS
from dynrank.callbacks import BestWeights, RankScheduler
from dynrank.driver.checks import check_model
from dynrank.driver.metrics import judging_metrics
from dynrank.errors import ConfigurationError, Count, Positive, checked_call, shown
from dynrank.layers.frozen_base import check_base, left_out
from dynrank.output.checkpoint_file import read_checkpoint
from dynrank.schedules.stage import Stage, check_schedule
from dynrank.triggers import Run

VAL_LOSS = "val/loss"
# In a schedule of at most so many changes each one is measured.
_MEASURED = 2
# Parts that a checkpoint must have to resume from it.
_PARTS = {"optimizer_states", "loops", "callbacks", "global_step"}


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
    best = BestWeights(*_judged_by(config.objective, job.task.metrics))
    trainer = make_trainer(config, folder, job.scheduler, meter, best, sweep=sweep)
    first = trainer.is_global_zero
    lock = locked(folder, resumed=resumed) if first else nullcontext()
    with finished(), lock, stoppable(trainer, checkpoint, folder):
        if first:
            _write_config(given, folder)
        if first and record is not None:
            record()
        if first and job.adapter is not None and checkpoint is None:
            print_facts(start_facts(config, job.adapter, job.module, job.scheduler))
        if first and checkpoint is not None:
            step = read_checkpoint(checkpoint)["global_step"]
            print_facts({"goes on from": f"step {step}, {checkpoint}"})
            if resumed:
                csv_logger: Any = trainer.loggers[0]
                # There the n-th step has number n - 1.
                log_again(folder / METRICS, step, csv_logger)
        trainer.fit(job.module, job.task, ckpt_path=checkpoint)
        if config.export_weights == "best" and best.misses(trainer):
            # The run was killed in the validation after its last step.
            trainer.validate(job.module, job.task, verbose=False)
        model: Any = job.module.model
        weights = _choose_weights(job.module, best, config.export_weights, trainer.global_step)
        # The trainer returns one mapping for each data loader.
        tested = trainer.test(job.module, job.task, verbose=False)
        metrics = {name: value for of_loader in tested for name, value in of_loader.items()}
        seconds = time.perf_counter() - start
        # Only some tasks count their data.
        data = dict(getattr(job.task, "account", {}))
        steps = trainer.global_step
        summary = summarise(model, job.scheduler.history, metrics, meter, seconds, steps, data, weights)
        # All processes hold a part of a base that is sharded.
        base = base_of(model)
        if first:
            export(model, job.task, summary, folder, config, base)
    return summary


def _write_config(config: DictConfig, folder: Path) -> None:
    file = folder / CONFIG
    file.parent.mkdir(exist_ok=True)
    OmegaConf.save(config, file)


@names_keys
def build(config: DictConfig, *, on_meta: bool = False) -> Job:
    """Make the objects of a run, cheap checks first; ``on_meta`` builds the model without its weights."""
    check_run_keys(config)
    adapter = adapter_of(config)
    lora = lora_arguments(config, adapter)
    _check_trainer(**plain(config.trainer))
    steps = config.trainer.get("max_steps", -1)
    run = Run(steps if steps > 0 else None)
    scheduler = make_scheduler(config.schedule)
    with named(keys_of(config.schedule, "schedule")):
        check_schedule(scheduler.driver.stages, run)
    if config.plots and find_spec("matplotlib") is None:
        raise ConfigurationError("plots need matplotlib: pip install 'dynrank[plots]', or set plots=false")
    checkpoint = read_checkpoint(config.ckpt_path) if config.ckpt_path is not None else None
    seed_everything(config.seed, verbose=False)
    task = make_task(config, on_meta=on_meta)
    # A task of your own need not log what is measured, and each of many changes would take two validations.
    stages = [_measured(stage) for stage in scheduler.driver.stages]
    is_logged = judging_metrics(stages) <= {*task.metrics}
    if config.trainer.get("limit_val_batches") != 0 and is_logged and len(stages) <= _MEASURED:
        scheduler.driver.stages = stages
    _check_metrics(scheduler.driver.monitors, task.metrics, config.objective, task.final)
    # A task of your own need not take anything over, and a task without data has no classes.
    if adapter is not None and hasattr(task, "go_on_from") and not (on_meta and lacks_data(config)):
        task.go_on_from(Path(adapter.source))
    with named(keys_of(config.lora, "lora")):
        module = task.module(lora, plain(config.optimizer), on_meta=on_meta)
    if adapter is not None and not on_meta:
        # The factors of a checkpoint replace these.
        start_from(module.model, adapter)
    with named(keys_of(config.schedule, "schedule")):
        check_model(module.model, scheduler.driver.stages, run, scheduler.driver.rules)
    if checkpoint is not None and not on_meta:
        _check_checkpoint(config, checkpoint, module)
    return Job(task, module, scheduler, adapter)


@names_keys
def adapter_of(config: DictConfig) -> Adapter | None:
    """The adapter ``lora.from``, from which training goes on."""
    place = config.lora.get("from")
    return None if place is None else read_adapter(adapter_folder(Path(place)))


@names_keys
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


def _judged_by(objective: str | None, logged: Sequence[str]) -> tuple[str, Literal["min", "max"]]:
    """The metric that says which validation was the best, and whether a smaller value is better."""
    monitor = objective if objective is not None and objective in logged and objective.startswith("val/") else VAL_LOSS
    return monitor, better(monitor)


def _choose_weights(module: nn.Module, best: BestWeights, choice: str, last_step: int) -> str:
    """Put the weights that ``export_weights`` chooses into ``module``; returns which they are."""
    if choice == "last":
        return f"of the last step, {last_step:,} (export_weights=last)"
    if best.step is None:
        return f"of the last step, {last_step:,}: {best.why_none}"
    best.restore(module)
    return f"of step {best.step:,} of {last_step:,}: the best {best.monitor} since the last change, {best.value:.4g}"


@checked_call
def _check_trainer(
    *,
    max_steps: int = -1,
    accumulate_grad_batches: Count = 1,
    val_check_interval: Positive | None = None,
    fast_dev_run: Literal[False] = False,
    overfit_batches: float = 0.0,
    **_: Any,
) -> None:
    """Refuse values that Lightning takes, or refuses in the middle of training."""
    if overfit_batches:
        raise ConfigurationError(
            f"trainer.overfit_batches={overfit_batches} is not for dynrank's batches, which differ in each epoch; "
            "task.limit=N trains on N rows"
        )


def _check_metrics(monitors: Iterable[str], logged: Sequence[str], objective: str | None, final: Sequence[str]) -> None:
    """Refuse what the task never measures: a schedule's ``monitors`` in training, an ``objective`` at the end."""
    unknown = [name for name in monitors if name not in logged]
    if unknown:
        raise ConfigurationError(
            f"a schedule must watch a logged metric, got {unknown}; logged: {sorted(logged)}; "
            "set schedule.trigger.monitor or schedule.how.check_monitor"
        )
    if objective is not None and objective not in final:
        raise ConfigurationError(f"objective must be null or one of {sorted(final)}, got {objective!r}")


def _check_checkpoint(config: DictConfig, checkpoint: Mapping[str, Any], module: LightningModule) -> None:
    """Refuse a checkpoint (read from ``config.ckpt_path``) that ``module`` cannot go on from; ranks may differ."""
    path = config.ckpt_path
    lacking = sorted(_PARTS - checkpoint.keys())
    if lacking:
        raise ConfigurationError(f"the checkpoint {path!r} lacks {lacking}; set ckpt_path")
    # A module of your own need not save its arguments, and only a classifier has labels.
    before = dict(checkpoint.get("hyper_parameters") or {})
    before["optimizer.name"] = dict(before.get("optimizer") or {}).get("name")
    now = {**module.hparams, "optimizer.name": config.optimizer.name}
    # As many of other classes would fit the head by their shape.
    for name in ("optimizer.name", "labels", "several"):
        if before.get(name) is not None and before[name] != now.get(name):
            raise ConfigurationError(
                f"the checkpoint {path!r} is of another run: {name} is {shown(before[name])} there, and "
                f"{shown(now.get(name))} here; set ckpt_path, optimizer or data"
            )
    stored = checkpoint["state_dict"]
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
