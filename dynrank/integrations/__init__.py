"""Ranks that change in axolotl and LLaMA-Factory: each reads the same key ``dynrank`` in the YAML that starts a run."""

from collections.abc import Mapping
from typing import Any

from dynrank import schedules
from dynrank.callbacks import RankTrainerCallback
from dynrank.errors import ConfigurationError

_SCHEDULES = ("early_budget", "auto", "after_convergence", "anneal", "milestones", "energy", "grow", "fixed")


def callback_of(settings: Mapping[str, Any] | None, rank: int | None) -> RankTrainerCallback:
    """The callback for a run whose YAML has ``settings`` under the key ``dynrank``.

    Args:
        settings: the name of a ``schedule`` (early_budget if there is none) and its arguments, as in
            :mod:`dynrank.schedules`, and ``rank_map`` and ``kernel`` as in :class:`RankTrainerCallback`; None:
            early_budget to half of ``rank``.
        rank: the starting rank of the run.

    Raises:
        ConfigurationError: if the schedule or an argument is unknown, or a value cannot be used.

    >>> callback_of({"schedule": "anneal", "final_rank": 4, "steps": 2}, 16).driver.stages[1].to.final_rank
    4
    """
    if settings is not None and not isinstance(settings, Mapping):
        raise ConfigurationError(
            f"dynrank must be a mapping of schedule and its arguments, got {settings!r}", "dynrank"
        )
    arguments = dict(settings or {})
    name = arguments.pop("schedule", "early_budget")
    others = {key: arguments.pop(key) for key in ("rank_map", "kernel") if key in arguments}
    if name not in _SCHEDULES:
        raise ConfigurationError(
            f"schedule of dynrank must be one of {', '.join(_SCHEDULES)}, got {name!r}", "schedule"
        )
    if name == "early_budget" and not arguments and rank is not None:
        arguments = {"final_rank": max(1, rank // 2)}
    return RankTrainerCallback(getattr(schedules, name)(**arguments), **others)
