"""The metrics that a schedule reads, by the names that the user gives."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields

from dynrank.distributed.processes import mean_over_processes
from dynrank.errors import ConfigurationError
from dynrank.schedules import Stage
from dynrank.triggers import Trigger

CHECK_MONITOR = "check_monitor of How (schedule.how.check_monitor)"


def watched(stages: Sequence[Stage]) -> dict[str, str]:
    """{metric that a trigger reads: the argument that names it, for error messages}."""
    triggers = [stage.when for stage in stages if isinstance(stage.when, Trigger)]
    return {name: _argument(trigger, name) for trigger in triggers for name in trigger.monitors}


def _argument(trigger: Trigger, name: str) -> str:
    values = {field.name: getattr(trigger, field.name) for field in fields(trigger)}
    named = [argument for argument, value in values.items() if isinstance(value, str) and value == name]
    argument = named[0] if named else "monitors"
    return f"{argument} of {type(trigger).__name__} (schedule.trigger.{argument})"


def checked(stages: Sequence[Stage]) -> dict[str, str]:
    """The same for the metrics that decide whether a change is undone; a validation must log them."""
    hows = [stage.how for stage in stages if stage.how.max_regression is not None]
    # Whoever writes another How leaves out what the schedule's own has.
    return {
        how.check_monitor: f"{CHECK_MONITOR}, beside metric={how.metric!r} and rate_after={how.rate_after!r},"
        for how in hows
    }


def value(metrics: Mapping[str, float], name: str, arguments: Mapping[str, str]) -> float:
    """The metric, as the mean over all processes."""
    if name not in metrics:
        raise _not_logged(name, arguments, metrics)
    return mean_over_processes(float(metrics[name]))


def check_validation(logged: Collection[str], stages: Sequence[Stage]) -> None:
    """Refuse a schedule that reads a metric of validations which the first validation has not logged.

    A trigger may also read a metric that only training logs. So a trigger's metric counts as one of validations only
    if its prefix (such as ``val/``) is that of a logged one.
    """
    groups = {name.partition("/")[0] for name in logged if "/" in name}
    names = {name: argument for name, argument in watched(stages).items() if name.partition("/")[0] in groups}
    names |= checked(stages)
    for name in names.keys() - set(logged):
        raise ConfigurationError(
            f"{_not_logged(name, names, logged)}; if later validations log it, set trainer.num_sanity_val_steps=0"
        )


def _not_logged(name: str, arguments: Mapping[str, str], logged: Collection[str]) -> ConfigurationError:
    found = ", ".join(map(repr, sorted(logged)))
    return ConfigurationError(f"{arguments[name]} must name a metric that is logged, got {name!r}; logged: {found}")
