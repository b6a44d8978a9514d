"""The cache of ``datasets`` on the disk: how it is filled, by how many processes, and what is said if it cannot be."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import datasets
from datasets.exceptions import DatasetGenerationError

from dynrank.errors import ConfigurationError

# Count this up when rows are read in another way, so that older rows in a cache are not taken.
READ = 2
# So many rows are worth a process of their own.
_ENOUGH = 20_000


def processes(rows: int) -> int | None:
    """How many processes ``datasets`` is to use for so many rows; None: this one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = min(cores, rows // _ENOUGH)
    return count if count > 1 else None


@contextmanager
def quiet() -> Iterator[None]:
    """Let ``datasets`` work within the block: with a progress bar where somebody watches, and in no words but ours."""
    (datasets.enable_progress_bars if sys.stderr.isatty() else datasets.disable_progress_bars)()
    verbosity = datasets.logging.get_verbosity()
    # datasets would log in its own words what is raised here.
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)


@contextmanager
def filling() -> Iterator[None]:
    """Fill the cache within the block, quietly."""
    try:
        with quiet():
            yield
    except (OSError, DatasetGenerationError) as error:
        cause = error.__cause__ if isinstance(error, DatasetGenerationError) else error
        if not isinstance(cause, OSError):
            raise
        raise ConfigurationError(
            f"the cache {str(datasets.config.HF_DATASETS_CACHE)!r} cannot be written to: {cause}; set the environment "
            "variable HF_HOME to a folder that can be, with room for the data and their tokens"
        ) from cause
