"""The disk cache of ``datasets``: filling it quietly, by several processes, and the error if it cannot be written."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import datasets
from datasets.exceptions import DatasetGenerationError

from dynrank.errors import ConfigurationError

# Increase this number when rows are read differently, so that old rows in a cache are not used.
READ = 3
# The fewest rows for which one more process is worth its start.
_ENOUGH = 20_000


def processes(rows: int) -> int | None:
    """The number of processes in which ``datasets`` handles this many rows; None: this process does it alone."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = min(cores, rows // _ENOUGH)
    return count if count > 1 else None


@contextmanager
def quiet() -> Iterator[None]:
    """Silence ``datasets`` within the block; on a terminal it shows progress bars."""
    (datasets.enable_progress_bars if sys.stderr.isatty() else datasets.disable_progress_bars)()
    verbosity = datasets.logging.get_verbosity()
    # datasets would log each error that it raises.
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)


@contextmanager
def filling() -> Iterator[None]:
    """Silence ``datasets`` within the block, and turn errors of writing its cache into a ConfigurationError."""
    try:
        with quiet():
            yield
    except (OSError, DatasetGenerationError) as error:
        cause = error.__cause__ if isinstance(error, DatasetGenerationError) else error
        # Only errors of the system have a number; pyarrow's OSErrors about the content of a file have none.
        if not isinstance(cause, OSError) or cause.errno is None:
            raise
        raise ConfigurationError(
            f"the cache {str(datasets.config.HF_DATASETS_CACHE)!r} cannot be written to: {cause}; set the environment "
            "variable HF_HOME to a folder that can be, with room for the data and their tokens"
        ) from cause
