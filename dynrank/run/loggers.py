"""The loggers of a run: metrics.csv, and those that the user has chosen."""

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

__all__ = ["check_loggers", "finished", "make_loggers"]

_PACKAGES = ("tensorboard", "wandb", "mlflow")  # choices of the group, and the extras that bring them


def check_loggers(config: DictConfig) -> None:
    """Refuse a logger whose package is not installed.

    Raises:
        ConfigurationError: saying what to install.
    """
    for name in config.logger or ():
        if name in _PACKAGES and getattr(find_spec(name), "origin", None) is None:  # a folder wandb/ is no package
            raise ConfigurationError(f"logger={name} needs {name}: pip install 'dynrank[{name}]', or set logger=csv")


def make_loggers(config: DictConfig, folder: Path) -> list[Logger]:
    """metrics.csv in ``folder`` first, then the loggers that ``config.logger`` describes."""
    chosen = [make(node, f"logger.{name}") for name, node in (config.logger or {}).items()]
    return [CSVLogger(str(folder), name="", version=""), *chosen]


@contextmanager
def finished() -> Iterator[None]:
    """End what the block has begun with Weights & Biases, which would take this process's next run for the same."""
    try:
        yield
    finally:
        run = getattr(sys.modules.get("wandb"), "run", None)
        if run is not None:
            run.finish()
