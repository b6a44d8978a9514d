"""Lightning callbacks; each works by itself in any LightningModule."""

from dynrank.callbacks.rank_monitor import RankMonitor
from dynrank.callbacks.rank_scheduler import RankScheduler
from dynrank.callbacks.run_meter import RunMeter
from dynrank.callbacks.schedule_free_mode import ScheduleFreeMode
from dynrank.callbacks.step_seed import StepSeed
from dynrank.rank_change import RankEvent

__all__ = ["RankEvent", "RankMonitor", "RankScheduler", "RunMeter", "ScheduleFreeMode", "StepSeed"]
