"""Callbacks: Lightning's, which work in any LightningModule, and one for transformers' Trainer.

Names load on first use: Lightning's users do not load transformers' Trainer, and the Trainer's need no Lightning.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

# The same names, for type checkers.
if TYPE_CHECKING:
    from dynrank.callbacks.lightning.adapter_checkpoint import AdapterCheckpoint as AdapterCheckpoint
    from dynrank.callbacks.lightning.best_weights import BestWeights as BestWeights
    from dynrank.callbacks.lightning.rank_monitor import RankMonitor as RankMonitor
    from dynrank.callbacks.lightning.rank_scheduler import RankScheduler as RankScheduler
    from dynrank.callbacks.lightning.step_seed import StepSeed as StepSeed
    from dynrank.callbacks.transformers.rank_trainer_callback import RankTrainerCallback as RankTrainerCallback
    from dynrank.driver.event import RankEvent as RankEvent

_HOMES = {
    "AdapterCheckpoint": "dynrank.callbacks.lightning.adapter_checkpoint",
    "BestWeights": "dynrank.callbacks.lightning.best_weights",
    "RankEvent": "dynrank.driver.event",
    "RankMonitor": "dynrank.callbacks.lightning.rank_monitor",
    "RankScheduler": "dynrank.callbacks.lightning.rank_scheduler",
    "RankTrainerCallback": "dynrank.callbacks.transformers.rank_trainer_callback",
    "StepSeed": "dynrank.callbacks.lightning.step_seed",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from dynrank.errors import train_packages

    with train_packages(name):
        value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
