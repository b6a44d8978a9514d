"""The runs of a sweep: each is started, resumed, or skipped because it has ended; the table comes at the end."""

import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from dynrank.errors import ConfigurationError
from dynrank.output.console import print_facts, quiet_imports
from dynrank.runs.folder import last_checkpoint
from dynrank.runs.summary import SUMMARY, Summary, read_summary
from dynrank.runs.sweep.table import show_sweep


def run_in_sweep(config: DictConfig, folder: Path, record: Callable[[], None]) -> float | None:
    """Make the run that ``config`` describes in ``folder``; returns its ``objective`` at the final weights.

    With ``ckpt_path=last`` a finished run is skipped, an interrupted run is resumed from its checkpoint, and a run
    without a checkpoint is started. ``record`` writes the configuration into the folder.
    """
    try:
        summary = _summary(config, folder, record)
        return None if config.objective is None else summary.final[config.objective]
    except Exception as error:
        # Hydra raises only the first error of a sweep, after all runs.
        print(f"no result        {folder}: {type(error).__name__}: {error}", file=sys.stderr)
        if not isinstance(error, ConfigurationError):
            traceback.print_exception(error)
        raise


def _summary(config: DictConfig, folder: Path, begin: Callable[[], None]) -> Summary:
    if config.ckpt_path == "last":
        _check_same(folder, config)
        if (folder / SUMMARY).exists():
            print_facts({"has ended before": folder})
            return read_summary(folder)
        if not last_checkpoint(folder).exists():
            config.ckpt_path = None
    # This import loads torch and transformers, which takes seconds.
    from dynrank.runs.job import run

    return run(config, folder, sweep=True, record=begin)


def _check_same(folder: Path, config: DictConfig) -> None:
    """Refuse to resume a run that was started with other values than ``config``; a folder without a run is allowed."""
    file = folder / ".hydra" / "config.yaml"
    if not file.exists():
        return
    before, now = (_flat(OmegaConf.to_container(values)) for values in (OmegaConf.load(file), config))
    wrong = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key) and key != "ckpt_path")
    if wrong:
        raise ConfigurationError(
            f"ckpt_path=last: {str(folder)!r} holds a run with {wrong[0]}={before.get(wrong[0])!r}, not "
            f"{now.get(wrong[0])!r} (keys that differ: {wrong[:5]}); start the sweep as it was started first, or set "
            "hydra.sweep.dir to a new folder"
        )


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves of nested mappings by their dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat


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
    """Show the table if the block made a sweep; after an interruption, say how to resume it."""
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
            where = SweepFolder.begun[0]
            print(f"go on with the same arguments and hydra.sweep.dir={where} ckpt_path=last", file=sys.stderr)
        raise
    if SweepFolder.begun is not None:
        show_sweep(*SweepFolder.begun)
