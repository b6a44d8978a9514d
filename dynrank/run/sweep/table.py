"""The table at the end of a sweep, whether all its runs have ended well or not."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from dynrank.output.console import quiet_imports
from dynrank.run.sweep.report import show_sweep


class SweepFolder(Callback):
    """Remembers where a sweep is made: Hydra tells its callbacks alone.

    The table is not made in ``on_multirun_end``, which Hydra calls only where no run failed, and whose errors it turns
    into warnings.

    Attributes:
        begun: folder, and whether to draw, of the sweep that this process is making.
    """

    begun: ClassVar[tuple[Path, bool] | None] = None

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        quiet_imports()  # of sweepers
        SweepFolder.begun = Path(config.hydra.sweep.dir), bool(OmegaConf.select(config, "plots", default=True))


@contextmanager
def table_at_end() -> Iterator[None]:
    """Show the table of the sweep that was made within, if it was one; after an interruption, how to go on."""
    SweepFolder.begun = None
    try:
        yield
    except Exception:
        if SweepFolder.begun is not None:
            _show_beside_error(*SweepFolder.begun)
        raise
    except (KeyboardInterrupt, SystemExit):
        if SweepFolder.begun is not None:
            where = SweepFolder.begun[0]
            print(f"go on with the same arguments and hydra.sweep.dir={where} ckpt_path=last", file=sys.stderr)
        raise
    if SweepFolder.begun is not None:
        show_sweep(SweepFolder.begun[0], plot=SweepFolder.begun[1])


def _show_beside_error(folder: Path, plot: bool) -> None:
    """Show what there is; nothing, if the sweep was refused as a whole."""
    try:
        if not folder.exists():
            return
        show_sweep(folder, plot=plot)
    except Exception as error:  # none takes the place of the one that ended the sweep, which is raised next
        print(f"no table of the sweep: {type(error).__name__}: {error}", file=sys.stderr)
