"""When to change ranks: at a known time, or by metrics of validations."""

from dynrank.triggers.base import Trigger
from dynrank.triggers.clock import At, Run
from dynrank.triggers.metrics import Gap, Plateau

__all__ = ["At", "Gap", "Plateau", "Run", "Trigger"]
