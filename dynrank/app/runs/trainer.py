"""The lightning.Trainer of a run: its callbacks and loggers, its end by a signal, and silence of libraries."""

import csv
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException
from omegaconf import DictConfig

from dynrank.app.console import quiet_loading
from dynrank.app.runs.config import make, plain
from dynrank.app.runs.folder import HISTORY, last_checkpoint
from dynrank.app.runs.run_meter import RunMeter
from dynrank.callbacks import AdapterCheckpoint, BestWeights, RankMonitor, RankScheduler, StepSeed
from dynrank.callbacks.lightning.private import save_as
from dynrank.callbacks.lightning.strategies import check_strategy
from dynrank.callbacks.lightning.training import is_last_step
from dynrank.errors import ConfigurationError

# AdapterCheckpoint saves after the step in which one of them comes.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def make_trainer(
    config: DictConfig, folder: Path, scheduler: RankScheduler, meter: RunMeter, best: BestWeights, *, sweep: bool
) -> Trainer:
    """The trainer of the run that ``config`` describes, which writes into ``folder``."""
    checkpoint = _RunCheckpoint(last_checkpoint(folder), config.checkpoint_every)
    callbacks: list[Any] = [scheduler, StepSeed(config.seed), meter]
    callbacks += [RankMonitor(folder / HISTORY, model_name="model")]
    callbacks += [_Bar()] if config.trainer.enable_progress_bar else []
    loggers = [make(node, f"logger.{name}") for name, node in (config.logger or {}).items()]
    options = plain(config.trainer)
    if isinstance(config.trainer.strategy, DictConfig):
        options["strategy"] = make(config.trainer.strategy, "trainer.strategy")
    try:
        trainer = Trainer(
            **options,
            default_root_dir=folder,
            callbacks=[*callbacks, checkpoint, *([best] if config.export_weights == "best" else [])],
            logger=[CSVLogger(str(folder), name="", version=""), *loggers],
            enable_model_summary=False,
        )
    except (MisconfigurationException, TypeError, ValueError) as error:
        raise ConfigurationError(f"lightning.Trainer does not take these values: {error}; set trainer") from error
    # Under SLURM each run of a sweep is a job of its own.
    if sweep and trainer.world_size > 1 and os.environ.get("SUBMITIT_EXECUTOR") != "slurm":
        raise ConfigurationError(
            f"--multirun cannot make a run of {trainer.world_size} processes: each would do the whole sweep; set "
            "trainer.devices=1, make one run after the other without --multirun, or set hydra/launcher=submitit_slurm"
        )
    # The scheduler checks this, too, but only when the other processes have been started.
    check_strategy(trainer)
    return trainer


def log_again(file: Path, step: int, logger: CSVLogger) -> None:
    """Log the rows of ``file`` before ``step`` again: Lightning's logger begins metrics.csv anew in a resumed run.

    Until this is done they have another name, so that a run that is killed meanwhile keeps them, too.
    """
    kept = file.with_suffix(".before")
    if file.exists() and not kept.exists():
        file.rename(kept)
    if not kept.exists():
        return
    with kept.open(newline="", encoding="utf-8") as opened:
        # A row that was cut short by a kill may have no step.
        rows = [row for row in csv.DictReader(opened) if (row.get("step") or "").isdigit() and int(row["step"]) < step]
    for row in rows:
        values: dict[str, Any] = {name: value for name, value in row.items() if value and name not in ("step", None)}
        logger.log_metrics(values, int(row["step"]))
    logger.save()
    kept.unlink()


class _RunCheckpoint(AdapterCheckpoint):
    """Saves into one file after every ``every`` steps, and after the last step.

    So a run that is killed in its last validation, in its test or in its export trains no step again.
    """

    stop_signals = STOP_SIGNALS

    def __init__(self, file: Path, every: int) -> None:
        super().__init__(
            file.parent, filename=file.stem, every_n_train_steps=every, save_top_k=1, enable_version_counter=False
        )
        self._file = file
        self._every = every

    def on_train_batch_end(self, trainer: Trainer, *arguments: Any) -> None:
        super().on_train_batch_end(trainer, *arguments)
        # At the end of training, Lightning's loops count an epoch as whole that max_steps has cut short, and a run that
        # is to train on would skip the rest of it.
        if (is_last_step(trainer) or trainer.should_stop) and trainer.global_step % self._every:
            save_as(self, trainer, str(self._file))


class _Bar(RichProgressBar):
    """Shows no total of epochs in a run that has none, where Lightning would show -2."""

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_epoch_start(trainer, pl_module)
        if trainer.max_epochs == -1 and self.progress is not None and self.train_progress_bar_id is not None:
            self.progress.update(self.train_progress_bar_id, description=f"Epoch {trainer.current_epoch}")


@contextmanager
def stoppable(trainer: Trainer, folder: Path) -> Iterator[None]:
    """Say how to resume the run in ``folder`` if it ends within the block by Ctrl-C or, in training, by SIGTERM.

    Ctrl-C is raised again. ``trainer`` has an AdapterCheckpoint for STOP_SIGNALS. The handlers of these signals are
    those of before after the block: Lightning leaves Ctrl-C ignored where it has ended a run. A run of Weights & Biases
    ends, too, which this process's next run would otherwise continue.
    """
    saver: Any = trainer.checkpoint_callback
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as stop:
        # Outside of training steps, Lightning turns Ctrl-C into exit code 1.
        pressed = saver.stopped_by == signal.SIGINT or KeyboardInterrupt in (type(stop), type(stop.__context__))
        if not pressed and not isinstance(stop, SIGTERMException):
            raise
        if trainer.is_global_zero:
            advice = f"go on by the same command with ckpt_path=last hydra.run.dir={folder}"
            advice = advice if last_checkpoint(folder).exists() else "there is no checkpoint yet"
            name = "Ctrl-C" if pressed else "SIGTERM"
            print(f"{name}: stopped after step {trainer.global_step}; {advice}", file=sys.stderr)
        if pressed:
            raise KeyboardInterrupt from stop
        raise
    except MisconfigurationException as error:
        raise ConfigurationError(f"{' '.join(str(error).split())} (said by Lightning; set trainer)") from error
    finally:
        if (run := getattr(sys.modules.get("wandb"), "run", None)) is not None:
            run.finish()
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():
                signal.signal(number, handler)


def quiet_training() -> None:
    """Silence what libraries print in every run."""
    quiet_loading()
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # The folder exists because .hydra/ is in it; one with an old run has been refused.
    warnings.filterwarnings("ignore", "Experiment logs directory .* exists")
    # A resumed run goes on in a folder of its own.
    warnings.filterwarnings("ignore", "The dirpath has changed")
    # Lightning 2.6 itself uses what torch 2.13 has deprecated.
    warnings.filterwarnings("ignore", r".isinstance\(treespec, LeafSpec\)", FutureWarning)
    # Batches are ready in memory, so workers would not help.
    warnings.filterwarnings("ignore", "The '.*_dataloader' does not have many workers")
