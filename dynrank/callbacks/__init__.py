"""Callbacks: Lightning's, which work in any LightningModule, and one for transformers' Trainer."""

from typing import TYPE_CHECKING, Any

from dynrank.callbacks.adapter_checkpoint import AdapterCheckpoint
from dynrank.callbacks.best_weights import BestWeights
from dynrank.callbacks.lightning.strategies import check_strategy
from dynrank.callbacks.progress_lines import ProgressLines
from dynrank.callbacks.rank_monitor import RankMonitor, RankProgressBar
from dynrank.callbacks.rank_scheduler import RankScheduler
from dynrank.callbacks.run_meter import RunMeter, peak_memory_bytes
from dynrank.callbacks.step_seed import StepSeed
from dynrank.driver.event import RankEvent

if TYPE_CHECKING:
    from dynrank.callbacks.rank_trainer_callback import RankTrainerCallback

__all__ = [
    "AdapterCheckpoint",
    "BestWeights",
    "ProgressLines",
    "RankEvent",
    "RankMonitor",
    "RankProgressBar",
    "RankScheduler",
    "RankTrainerCallback",
    "RunMeter",
    "StepSeed",
    "check_strategy",
    "peak_memory_bytes",
]


def __getattr__(name: str) -> Any:
    """Import RankTrainerCallback on first use, so that Lightning's users do not load transformers' Trainer."""
    if name == "RankTrainerCallback":
        from dynrank.callbacks.rank_trainer_callback import RankTrainerCallback

        return RankTrainerCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
