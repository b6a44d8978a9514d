"""The runs of a sweep, and its table at the end."""

import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from dynrank.errors import ConfigurationError
from dynrank.output.console import quiet_imports
from dynrank.runs.sweep.table import show_sweep


def run_in_sweep(config: DictConfig, folder: Path, record: Callable[[], None]) -> float | None:
    """Make the run that ``config`` describes in ``folder``; returns its ``objective`` at the final weights.

    ``record`` writes the configuration into the folder.
    """
    # This import loads torch and transformers, which takes seconds.
    from dynrank.runs.job import run

    try:
        summary = run(config, folder, sweep=True, record=record)
        return None if config.objective is None else summary.final[config.objective]
    except Exception as error:
        # Hydra raises only the first error of a sweep, after all runs.
        print(f"no result        {folder}: {type(error).__name__}: {error}", file=sys.stderr)
        if not isinstance(error, ConfigurationError):
            traceback.print_exception(error)
        raise


class SweepFolder(Callback):
    """Stores the folder of a sweep, which Hydra passes only to its callbacks.

    The table is not made in ``on_multirun_end``, because Hydra calls that only if no run failed, and turns its errors
    into warnings.

    Attributes:
        begun: (folder, whether to draw the picture) of this process's sweep.
    """

    begun: ClassVar[tuple[Path, bool] | None] = None

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        # Sweepers import libraries that print messages.
        quiet_imports()
        SweepFolder.begun = Path(config.hydra.sweep.dir), bool(OmegaConf.select(config, "plots", default=True))


@contextmanager
def table_at_end() -> Iterator[None]:
    """Show the table if the block made a sweep; after an interruption, say how to get it."""
    SweepFolder.begun = None
    try:
        yield
    except Exception:
        # A sweep that was refused as a whole has no folder.
        if SweepFolder.begun is not None and SweepFolder.begun[0].is_dir():
            with suppress(ConfigurationError):
                show_sweep(*SweepFolder.begun)
        raise
    except (KeyboardInterrupt, SystemExit):
        if SweepFolder.begun is not None:
            print(f"the table of the runs so far: dynrank sweep {SweepFolder.begun[0]}", file=sys.stderr)
        raise
    if SweepFolder.begun is not None:
        show_sweep(*SweepFolder.begun)
