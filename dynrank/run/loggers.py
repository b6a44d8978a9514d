"""The loggers of a run: metrics.csv, and the loggers that the user has chosen."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from lightning.pytorch.loggers import CSVLogger, Logger
from omegaconf import DictConfig

from dynrank.errors import ConfigurationError
from dynrank.run.config import make

# The choices of the group ``logger`` are also the names of the extras that install them.
_PACKAGES = ("tensorboard", "wandb", "mlflow")


def check_loggers(config: DictConfig) -> None:
    """Refuse a logger whose package is not installed."""
    for name in config.logger or ():
        # A folder wandb/ in the current directory looks like a package, but has no file of origin.
        if name in _PACKAGES and getattr(find_spec(name), "origin", None) is None:
            raise ConfigurationError(f"logger={name} needs {name}: pip install 'dynrank[{name}]', or set logger=csv")


def make_loggers(config: DictConfig, folder: Path) -> list[Logger]:
    """metrics.csv in ``folder`` first, then the loggers that ``config.logger`` describes."""
    chosen = [make(node, f"logger.{name}") for name, node in (config.logger or {}).items()]
    return [CSVLogger(str(folder), name="", version=""), *chosen]


@contextmanager
def finished() -> Iterator[None]:
    """End the Weights & Biases run of the block, which this process's next run would otherwise continue."""
    try:
        yield
    finally:
        run = getattr(sys.modules.get("wandb"), "run", None)
        if run is not None:
            run.finish()
