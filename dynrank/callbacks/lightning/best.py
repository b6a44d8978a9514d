"""What Lightning's callbacks call the best so far, in a run whose ranks fall: only what comes after the last cut."""

import pickle
from collections.abc import Collection, Mapping
from math import inf
from pathlib import Path
from typing import NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from dynrank.callbacks.lightning import private
from dynrank.callbacks.lightning.resume import metrics_lent
from dynrank.callbacks.lightning.validations import run_validation, silent
from dynrank.driver.event import RankEvent
from dynrank.driver.schedulers import forget_plateau
from dynrank.layers.finding import lora_layers
from dynrank.output.ranks import ranks_in_words


def forget_best(trainer: Trainer, pl_module: LightningModule, event: RankEvent) -> None:
    """Let everything after ``event``, which has lowered ranks, count as better than everything before it.

    ModelCheckpoint keeps its files, and replaces them by the next ones that it writes, as it always does with the worst
    of its top k. EarlyStopping starts anew, and so does ReduceLROnPlateau.
    """
    forget_plateau([config.scheduler for config in trainer.lr_scheduler_configs])
    lost = []
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, ModelCheckpoint) and callback.best_k_models:
            file = saved_file(callback.best_model_path, pl_module)
            lost += [f"step {file.step} at {ranks_in_words(file.ranks)}" if file else callback.best_model_path]
        elif isinstance(callback, EarlyStopping) and callback.best_score.isfinite():
            best = f"{callback.monitor} {float(callback.best_score):.4g}"
            lost += [f"{best} at {ranks_in_words(event.ranks_before)}"]
        _begin_anew(callback)
    if lost:
        rank_zero_info(
            f"best so far: {'; '.join(dict.fromkeys(lost))}; from here on the best of "
            f"{ranks_in_words(_ranks(pl_module))} counts (RankScheduler's keep_best_before)"
        )


def forget_scores_of(trainer: Trainer, names: Collection[str], values: Mapping[str, float] | None = None) -> None:
    """Forget every score by one of the metrics ``names``, whose last value is of steps before a cut, too.

    Lightning keeps these values, and callbacks and schedulers take them for those of the changed model: a mean over an
    epoch that the cut has divided, or what neither steps nor validations have logged since. Call this before a metric
    is logged anew. If somebody may have read the new value already, give the ``values`` of before, which differ from
    it: only scores that are these values are forgotten.
    """
    for config in trainer.lr_scheduler_configs if names else ():
        name = _value_read(trainer, config.monitor, of_epoch=config.interval == "epoch")
        if name in names and (values is None or getattr(config.scheduler, "best", None) == values[name]):
            forget_plateau([config.scheduler])
    for callback in trainer.callbacks if names else ():  # type: ignore[attr-defined]
        of_epoch = private.reads_at_end_of_epoch(callback, trainer)
        name = _value_read(trainer, getattr(callback, "monitor", None), of_epoch=of_epoch)
        if name in names and (values is None or _score(callback) == values[name]):
            _begin_anew(callback)


def _value_read(trainer: Trainer, monitor: str | None, *, of_epoch: bool) -> str:
    """The metric that ``monitor`` is for who reads it at the end of epochs, or earlier; "": none."""
    return private.own_names(trainer, on_step=not of_epoch).get(monitor or "", monitor or "")


def _score(callback: Callback) -> float | None:
    """The best score of ``callback`` so far; None: it has none."""
    if isinstance(callback, ModelCheckpoint):
        return None if callback.best_model_score is None else float(callback.best_model_score)
    return float(callback.best_score) if isinstance(callback, EarlyStopping) else None


def _begin_anew(callback: Callback) -> None:
    """Let every later score of ``callback`` be better than those so far."""
    worst = torch.tensor(inf if getattr(callback, "mode", "min") == "min" else -inf)
    if isinstance(callback, ModelCheckpoint) and callback.best_k_models:
        callback.best_k_models = dict.fromkeys(callback.best_k_models, worst)
        callback.best_model_score = callback.kth_value = worst
    elif isinstance(callback, EarlyStopping):
        callback.best_score = worst
        callback.wait_count = 0


def validate_after_end(trainer: Trainer, scheduler: Callback, logged: Mapping[str, float]) -> None:
    """Validate once more, if the run is validated: ranks have changed behind the last step.

    ``scheduler`` is not called: its schedule has ended. ModelCheckpoints, which would save at the end of this
    validation, if at all, wait for :func:`save_after_end`. ``logged`` has the metrics of before a resume, too.
    """
    if trainer.enable_validation:
        with silent([*_savers(trainer), scheduler], "on_"), metrics_lent(trainer, logged):
            run_validation(trainer)


def save_after_end(trainer: Trainer, logged: Mapping[str, float]) -> None:
    """Save once more, after ranks have changed behind the last step; the arguments are those of the validation.

    Every ModelCheckpoint saves that has a best or a last file; one that keeps a file of every step, without a monitor,
    does not.
    """
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        return
    with metrics_lent(trainer, logged):
        for saver in _savers(trainer):
            if saver.save_last or saver.save_top_k > 0 or (saver.save_top_k and saver.monitor):
                private.save_now(saver, trainer)


def warn_of_other_ranks(trainer: Trainer, pl_module: LightningModule) -> None:
    """Warn if the best or the last checkpoint has other ranks than ``pl_module``, whose training has ended."""
    now = ranks_in_words(_ranks(pl_module))
    paths = {path: kind for c in _savers(trainer) for kind, path in (("last", c.last_model_path), _best(c)) if path}
    for path, kind in paths.items():
        file = saved_file(path, pl_module)
        if file is not None and file.ranks != _ranks(pl_module):
            rank_zero_warn(
                f"the {kind} checkpoint, {path!r} of step {file.step}, has {ranks_in_words(file.ranks)}, but the "
                f"trained model has {now}: no checkpoint was written after the last change of rank; change ranks "
                "earlier, validate and save more often, or call trainer.save_checkpoint now"
            )


class SavedFile(NamedTuple):
    """The step of a checkpoint, and the rank of each layer in it, in the order of the model's layers."""

    step: int
    ranks: list[int]


def saved_file(path: str, pl_module: LightningModule) -> SavedFile | None:
    """The step and the ranks of a local checkpoint of ``pl_module``; None for others, and for a folder of shards."""
    if not Path(path).is_file():
        return None
    try:
        # Without the values of tensors.
        checkpoint = torch.load(path, map_location="meta", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError):
        # The user's hyperparameters may be of classes that torch does not load, and another thread may write the file.
        return None
    names = {id(parameter): name for name, parameter in pl_module.named_parameters()}
    found = []
    for _, layer in lora_layers(pl_module):
        factor = checkpoint["state_dict"].get(names.get(id(layer.lora_A)))
        # A stack of experts has the rank in its second dimension, or several times in its first.
        found.append(layer.rank if factor is None else layer.rank * factor.numel() // layer.lora_A.numel())
    return SavedFile(int(checkpoint["global_step"]), found)


def _best(callback: ModelCheckpoint) -> tuple[str, str]:
    """(what the callback's "best" is, its path)."""
    return "best" if callback.monitor is not None else "last", callback.best_model_path


def _savers(trainer: Trainer) -> list[ModelCheckpoint]:
    return [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]


def _ranks(pl_module: LightningModule) -> list[int]:
    return [layer.rank for _, layer in lora_layers(pl_module)]
