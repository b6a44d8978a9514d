"""Lightning callbacks; each works by itself in any LightningModule."""

from dynrank.callbacks.rank_scheduler import RankEvent, RankScheduler
from dynrank.callbacks.step_seed import StepSeed

__all__ = ["RankEvent", "RankScheduler", "StepSeed"]
