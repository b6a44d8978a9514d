"""Refusing, before the first step, a model or a run with which a schedule cannot be carried out."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

import torch
from torch import nn

from dynrank.change.optimizer_state import check_optimizer, check_trained
from dynrank.distributed.sharding import check_whole
from dynrank.driver.bounds import BoundLayers
from dynrank.driver.event import RankEvent
from dynrank.driver.learning_rates import check_groups
from dynrank.driver.training import Training
from dynrank.errors import ConfigurationError
from dynrank.layers.finding import adapter_parameters, lora_layers
from dynrank.rank_map import FREE, RankBounds
from dynrank.schedules import Stage
from dynrank.schedules.stage import check_schedule
from dynrank.targets import Budget, Unchanged
from dynrank.targets.base import UNBOUNDED
from dynrank.triggers import Run

# Of a schedule without a rank map.
NO_RULES: Mapping[str, RankBounds] = MappingProxyType({})


# Where a schedule leads


def final_ranks(
    model: nn.Module, schedule: Sequence[Stage], rules: Mapping[str, RankBounds] = NO_RULES
) -> dict[str, int]:
    """{layer: its rank after the last stage}; only expected if the schedule :func:`depends_on_data`.

    ``rules`` are those of the schedule's rank map.
    """
    layers = BoundLayers.of(model, rules)
    ranks = layers.ranks
    for number, stage in enumerate(schedule, 1):
        ranks = layers.expected_ranks(stage, ranks, last=number == len(schedule))
    return ranks


def depends_on_data(schedule: Sequence[Stage]) -> bool:
    """Whether a stage reads singular values or importance, so that the ranks after it are known only in the run."""
    return any(stage.to.needs for stage in schedule)


# What is refused


def check_model(
    model: nn.Module, schedule: Sequence[Stage], run: Run, rules: Mapping[str, RankBounds] = NO_RULES
) -> None:
    """Refuse a model that the schedule, or its rank map of ``rules``, does not fit; weights' values do not matter."""
    check_schedule(schedule, run)
    layers = BoundLayers.of(model, rules)
    ranks = layers.ranks
    if not ranks:
        raise ConfigurationError(
            "a rank schedule needs a model with LoRA layers; call dynrank.add_lora on it", "target_modules"
        )
    changes = any(not isinstance(stage.to, Unchanged) for stage in schedule)
    if changes and all(map(layers.keeps_rank, ranks)):
        raise ConfigurationError(
            f"the schedule can change no rank: all {len(ranks)} layers are pinned by rank_map, or frozen; unpin or "
            "train some, or leave out the schedule",
            "rank_map",
        )
    faults = []
    arguments: list[str] = []
    for index, stage in enumerate(schedule):
        last = index == len(schedule) - 1
        # After such a stage ranks are only expected, so nothing that follows from them is refused.
        is_known = not depends_on_data(schedule[:index])
        found = _faults(stage, layers, ranks, last=last, is_known=is_known)
        faults += [f"stage {index + 1}: {fault}" for fault in found]
        arguments += stage.arguments if found else ()
        if not found:
            ranks = layers.expected_ranks(stage, ranks, last=last)
    if faults:
        raise ConfigurationError("the schedule does not fit the model:\n  " + "\n  ".join(faults[:20]), *arguments)
    if schedule:
        layers.check_reached(ranks)


def _faults(stage: Stage, layers: BoundLayers, ranks: Mapping[str, int], *, last: bool, is_known: bool) -> list[str]:
    """Why ``stage`` does not fit ``layers`` of these ranks."""
    bounds = layers.bounds
    # The layers without a rank of their own.
    free = [name for name in ranks if not layers.keeps_rank(name) and bounds[name].final_rank is None]
    if not free:
        return []
    states = layers.expected_states(ranks, last=last)
    if isinstance(stage.to, Budget) and (is_known or not stage.to.is_relative):
        given = stage.to.pool(states)
        least = stage.to.floor_parameters(states)
        if given < least:
            steered = ["rank_map"] if any(own != FREE for own in bounds.values()) else []
            return [
                f"the budget must be at least {least:,} parameters, the size of {len(states)} layers at the lowest "
                f"ranks, got {given:,} ({', '.join([stage.to.size, 'lowest', *steered])})"
            ]
        # Less than the present parameters is a change, though perhaps only of layers with a final rank of their own.
        if stage.to.share is not None and stage.to.share < 1:
            return []
    # PEFT allows a rank above min(d_in, d_out); a target below such a rank is a cut.
    most = {name: max(layers.layers[name].max_rank, ranks[name]) for name in free}
    if not stage.to.needs:
        unbounded = {name: replace(states[name], highest=bounds[name].highest or UNBOUNDED) for name in free}
        wanted = stage.to.ranks(states | unbounded)
        # A user's target may leave layers out.
        above = [name for name in free if wanted.get(name, 0) > most[name]]
        if above:
            bound = {name: layers.layers[name].bound for name in above}
            return [f"rank {wanted[name]} is above {bound[name]} = {most[name]} of {name!r}" for name in above]
    if isinstance(stage.to, Unchanged):
        return []
    # A target may name the ranks that layers have already. It must change them if they are higher or lower by one.
    for shift in (0, 1, -1):
        shifted = dict(ranks) | {name: min(max(1, ranks[name] + shift), most[name]) for name in free}
        after = layers.expected_ranks(stage, shifted, last=last)
        if not is_known or stage.search or any(after[name] != shifted[name] for name in free):
            return []
    return [f"{stage.to} changes none of the ranks {sorted({ranks[name] for name in free})}"]


def check_resumed(history: Sequence[RankEvent], ranks: Mapping[str, int], step: int) -> None:
    """Refuse ``ranks`` of a model, or a ``step``, that do not belong to the ``history`` of a state that was loaded."""
    known = {layer.layer: layer.rank_after for event in history if not event.undone for layer in event.layers}
    faults = [f"step {step}"] if step < history[-1].step else []
    faults += [f"rank {rank} of {n!r}, not {known[n]}" for n, rank in ranks.items() if known.get(n, rank) != rank]
    if faults:
        raise ConfigurationError(
            f"the schedule's state is of after its change at step {history[-1].step}, and the run has "
            f"{'; '.join(faults[:20])}; load ranks, weights, optimizer and step of the same checkpoint"
        )


def check_training(training: Training, stages: Collection[Stage]) -> None:
    """Refuse sharded or float16 adapters, unsupported optimizers, and a check in a run without validations."""
    factors = adapter_parameters(training.model)
    if stages:
        check_whole(training.model)
        check_trained(dict(lora_layers(training.model)), training.optimizers)
    if stages and any(factor.dtype == torch.float16 for factor in factors):
        raise ConfigurationError(
            "adapters are in float16 (as by precision=16-true), where Adam's eps of 1e-8 is zero and the first steps "
            'give NaN; keep them in float32 or bfloat16: set precision="16-mixed" or "bf16-true"',
            "precision",
        )
    for how in (stage.how for stage in stages):
        for optimizer in training.optimizers:
            check_optimizer(optimizer, factors, how.optimizer_state)
            check_groups(optimizer, factors, how)
        if how.max_regression is not None and not training.validates:
            raise ConfigurationError(
                f"max_regression={how.max_regression:g} (or tolerance) needs validations around a change; this run has "
                f"none: {training.validate_by}, or set max_regression=None (with auto, choose another schedule)",
                *("tolerance", "max_regression"),
            )
