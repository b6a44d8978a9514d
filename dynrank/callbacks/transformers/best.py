"""What the Trainer calls the best so far, in a run whose ranks fall: only what comes after the last cut."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import nn
from transformers import TrainerState, TrainingArguments

from dynrank.callbacks.transformers.training import TrainerTraining
from dynrank.driver.event import RankEvent
from dynrank.layers.finding import lora_layers
from dynrank.output.ranks import ranks_in_words


def ranks_of(model: nn.Module) -> list[int]:
    """The rank of each LoRA layer."""
    return [layer.rank for _, layer in lora_layers(model)]


def forget_best(
    args: TrainingArguments, state: TrainerState, event: RankEvent, ranks: list[int], saved: Mapping[int, list[int]]
) -> None:
    """Let everything after ``event``, which has lowered ranks, count as better than everything before it.

    EarlyStoppingCallback counts anew where there is no best metric.

    Args:
        args: the Trainer's arguments.
        state: the Trainer's state, which is changed.
        event: the change.
        ranks: the rank of each layer now.
        saved: {step of a checkpoint: its ranks}.
    """
    if state.is_world_process_zero:
        step = state.best_global_step
        before = event.ranks_before if step is None else saved.get(step, event.ranks_before)
        at = f"{args.metric_for_best_model} {state.best_metric:.4g}" if step is None else f"step {step}"
        print(
            f"best so far: {at} at {ranks_in_words(before)}; from here on the best of {ranks_in_words(ranks)} "
            "counts (RankTrainerCallback's keep_best_before)"
        )
    state.best_metric = None
    state.best_global_step = None
    state.best_model_checkpoint = None


def warn_of_other_ranks(training: TrainerTraining, saved: Mapping[int, list[int]]) -> None:
    """Warn if the best or the last checkpoint has other ranks than the model, whose training has ended.

    ``saved``: {step of a checkpoint: its ranks}.
    """
    state = training.trainer.state
    ranks = ranks_of(training.model)
    steps = {max(saved, default=0): "last"}
    if state.best_model_checkpoint is not None:
        steps[state.best_global_step] = "best"
    for step, kind in steps.items():
        folder = Path(training.trainer.args.output_dir) / f"checkpoint-{step}"
        if folder.is_dir() and saved.get(step, ranks) != ranks:
            training.warn(
                f"the {kind} checkpoint, {str(folder)!r}, has {ranks_in_words(saved[step])}, but the trained "
                f"model has {ranks_in_words(ranks)}: no checkpoint was written after the last change of "
                "rank; save the model by trainer.save_model, or change ranks earlier"
            )
