"""Targets: pure functions from the state of all layers to the next rank of each."""

from dynrank.targets.base import LayerState, Target
from dynrank.targets.budget import Budget
from dynrank.targets.per_layer import Energy, GrowTo, Rank, Towards, Unchanged

__all__ = ["Budget", "Energy", "GrowTo", "LayerState", "Rank", "Target", "Towards", "Unchanged"]
