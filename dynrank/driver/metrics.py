"""The metrics that a schedule reads, by the names that its user has given."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields

from dynrank.distributed.processes import mean_over_processes
from dynrank.errors import ConfigurationError
from dynrank.schedules import How, Stage
from dynrank.triggers import Trigger


def watched(stages: Sequence[Stage]) -> dict[str, str]:
    """{metric that a trigger watches: the argument that names it, for error messages}."""
    triggers = [stage.when for stage in stages if isinstance(stage.when, Trigger)]
    named = {name: f"monitors of {type(trigger).__name__}" for trigger in triggers for name in trigger.monitors}
    return named | {
        getattr(trigger, field.name): f"{field.name} of {type(trigger).__name__} (schedule.trigger.{field.name})"
        for trigger in triggers
        for field in fields(trigger)
        if getattr(trigger, field.name) in trigger.monitors
    }


def checked(hows: Sequence[How]) -> dict[str, str]:
    """The same of the metrics that decide whether a change is undone; a validation must log them."""
    names = {how.check_monitor for how in hows if how.max_regression is not None}
    return dict.fromkeys(names, "check_monitor of How (schedule.check_monitor)")


def value(metrics: Mapping[str, float], name: str, argument: str) -> float:
    """The metric, as the mean over all processes.

    Raises:
        ConfigurationError: if it is not there, naming ``argument``, which asks for it.
    """
    if name not in metrics:
        raise not_logged(name, argument, metrics)
    return mean_over_processes(float(metrics[name]))


def not_logged(name: str, argument: str, logged: Collection[str]) -> ConfigurationError:
    """What to say of a metric that is not there."""
    return ConfigurationError(
        f"{argument} must name a metric that is logged, got {name!r}; logged: {', '.join(map(repr, sorted(logged)))}"
    )
