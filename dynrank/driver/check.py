"""Refusing a model or a run in which a schedule cannot be carried out, before the first step."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from dynrank.change.optimizer_rules import check_optimizer
from dynrank.distributed.sharding import sharded_error, sharded_layers
from dynrank.driver.bounds import bounded, path
from dynrank.driver.rates import check_groups
from dynrank.driver.training import Training
from dynrank.errors import ConfigurationError
from dynrank.layers.base import max_rank
from dynrank.layers.finding import adapter_parameters, lora_layers
from dynrank.schedules import Stage, check_schedule
from dynrank.targets import Budget, LayerState
from dynrank.triggers import Run


def check_model(model: nn.Module, schedule: Sequence[Stage], run: Run) -> None:
    """Refuse a model that the schedule does not fit; the values of the weights do not matter."""
    layers = dict(lora_layers(model))
    if not layers:
        raise ConfigurationError(
            "a rank schedule needs a model with LoRA layers; call dynrank.add_lora on it (lora.target_modules)"
        )
    free = {name: layer for name, layer in layers.items() if not layer.pinned and layer.final_rank is None}
    if not free:
        return
    check_schedule(schedule, highest=max(layer.rank for layer in free.values()), run=run)
    paths = {name: path(layer, schedule) for name, layer in layers.items()}
    faults = []
    for index, stage in enumerate(schedule):
        before = {name: ranges[index] for name, ranges in paths.items()}
        after = {name: ranges[index + 1] for name, ranges in paths.items()}
        for name, layer in free.items():
            most, (_, _, wanted) = max_rank(layer), after[name]
            # PEFT allows a rank above min(d_in, d_out); a target below such a rank is a cut.
            if wanted > max(most, before[name][1]):
                faults.append(
                    f"stage {index + 1}: rank {wanted} is above min(d_in, d_out) = {most} of {name!r}; set {stage.key}"
                )
        known = all(low == high for low, high, _ in before.values())
        if isinstance(stage.to, Budget) and (known or not stage.to.is_relative):
            last = index == len(schedule) - 1
            states = {name: replace(bounded(layer, last), rank=before[name][0]) for name, layer in layers.items()}
            faults += [f"stage {index + 1}: {fault}" for fault in _budget_faults(stage.to, states)]
    if faults:
        raise ConfigurationError("the schedule does not fit the model:\n  " + "\n  ".join(faults[:20]))


def _budget_faults(budget: Budget, states: Mapping[str, LayerState]) -> Iterator[str]:
    given, least = budget.pool(states), budget.floor_parameters(states)
    if given < least:
        yield (
            f"the budget must be at least {least:,} parameters, the size of {len(states)} layers at the lowest ranks, "
            f"got {given:,}; set {budget.key} or schedule.lowest"
        )


def check_training(training: Training, stages: Collection[Stage]) -> None:
    """Refuse sharded or float16 adapters, unsupported optimizers, and a check in a run without validations."""
    factors, sharded = adapter_parameters(training.model), sharded_layers(training.model)
    if stages and sharded:
        raise sharded_error(sharded)
    if stages and any(factor.dtype == torch.float16 for factor in factors):
        raise ConfigurationError(
            "adapters are in float16 (as by precision=16-true), where Adam's eps of 1e-8 is zero and the first steps "
            "give NaN; keep them in float32 or bfloat16: set trainer.precision=16-mixed or bf16-true"
        )
    for how in (stage.how for stage in stages):
        for optimizer in training.optimizers:
            check_optimizer(optimizer, factors, how.optimizer_state)
            check_groups(optimizer, factors, how)
        if how.max_regression is not None and not training.validates:
            raise ConfigurationError(
                f"max_regression={how.max_regression:g} (or tolerance) needs validations around a change; this run has "
                f"none: {training.validate_by}, or set max_regression=None (schedule.how.max_regression=null)"
            )
