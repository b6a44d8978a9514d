"""To what rank: what is known of each layer, and pure functions of it that give its next rank."""

from dynrank.targets.base import UNBOUNDED, LayerState, Target
from dynrank.targets.budget import Budget, Smallest
from dynrank.targets.grow import Exactly, GrowBy, GrowTo
from dynrank.targets.shrink import EffectiveRank, Energy, Factor, FinalRanks, NumericalRank, Rank, Towards

__all__ = [
    "UNBOUNDED",
    "Budget",
    "EffectiveRank",
    "Energy",
    "Exactly",
    "Factor",
    "FinalRanks",
    "GrowBy",
    "GrowTo",
    "LayerState",
    "NumericalRank",
    "Rank",
    "Smallest",
    "Target",
    "Towards",
]
