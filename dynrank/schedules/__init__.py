"""Rank schedules: a list of stages, or a function from the optimizer step to a rank; both are small and join.

Lists of stages join with ``+``, functions with :func:`join`.
"""

from dynrank.schedules.functions import RankFunction, constant, cosine, from_function, geometric, join, linear
from dynrank.schedules.presets import (
    after_convergence,
    anneal,
    auto,
    budget,
    early_budget,
    energy,
    fixed,
    grow,
    grow_then_shrink,
    halving_on_plateau,
    milestones,
    one_stage,
    squeeze_at_end,
    squeeze_then_tune,
    stages,
)
from dynrank.schedules.stage import How, Stage, check_schedule

__all__ = [
    "How",
    "RankFunction",
    "Stage",
    "after_convergence",
    "anneal",
    "auto",
    "budget",
    "check_schedule",
    "constant",
    "cosine",
    "early_budget",
    "energy",
    "fixed",
    "from_function",
    "geometric",
    "grow",
    "grow_then_shrink",
    "halving_on_plateau",
    "join",
    "linear",
    "milestones",
    "one_stage",
    "squeeze_at_end",
    "squeeze_then_tune",
    "stages",
]
