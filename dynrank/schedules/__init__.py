"""Rank schedules: lists of stages, which can be joined with +. A stage says when ranks change, to what, and how."""

from dynrank.schedules.presets import (
    Schedule,
    after_convergence,
    anneal,
    auto,
    early_budget,
    energy,
    fixed,
    grow,
    milestones,
    rebalance,
    stages,
)
from dynrank.schedules.stage import How, Stage

__all__ = [
    "How",
    "Schedule",
    "Stage",
    "after_convergence",
    "anneal",
    "auto",
    "early_budget",
    "energy",
    "fixed",
    "grow",
    "milestones",
    "rebalance",
    "stages",
]
