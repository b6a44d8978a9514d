"""When to change ranks: at a known time, on logged metrics, or on the factors themselves."""

from dynrank.triggers.base import Trigger
from dynrank.triggers.clock import At, Run
from dynrank.triggers.factors import SubspaceStable, TailEnergy
from dynrank.triggers.metrics import Gap, Plateau, Slope

__all__ = ["At", "Gap", "Plateau", "Run", "Slope", "SubspaceStable", "TailEnergy", "Trigger"]
