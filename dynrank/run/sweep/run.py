"""One run of a sweep: made, gone on with, or left alone because it has ended; one that fails says so in its folder."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from dynrank.errors import ConfigurationError
from dynrank.run.folder import release
from dynrank.run.sweep.report import FAULT


def run_in_sweep(config: DictConfig, folder: Path, record: Callable[[], None]) -> float | None:
    """Make the run that ``config`` describes in ``folder``; returns its ``objective`` at the final weights.

    With ``ckpt_path=last`` a run that has ended is left alone, one that was interrupted goes on from its checkpoint,
    and one that has no checkpoint begins.

    Args:
        config: of the run.
        folder: of the run.
        record: writes the configuration into ``folder``.

    Raises:
        ConfigurationError: if a value cannot be used, or ``folder`` holds a run of another configuration.
    """
    composed = OmegaConf.to_container(config)
    own = not (folder / ".hydra").exists()

    def begin() -> None:
        nonlocal own
        own = True
        (folder / FAULT).unlink(missing_ok=True)  # of an earlier try
        record()

    try:
        if config.ckpt_path == "last":
            _check_same(folder, composed)
            own = True
            if (folder / "summary.json").exists():
                print(f"has ended before {folder}")
                return _objective(json.loads((folder / "summary.json").read_text(encoding="utf-8")), config.objective)
            if not (folder / "checkpoints" / "last.ckpt").exists():
                release(folder)
                config.ckpt_path = None
        from dynrank.run.job import run  # torch and transformers load here

        return _objective(run(config, folder, sweep=True, record=begin), config.objective)
    except Exception as error:
        said = f"{type(error).__name__}: {' '.join(str(error).split())}"
        print(f"no result        {folder}: {said}", file=sys.stderr)
        if own:  # not the run of somebody else that the folder holds
            if not (folder / ".hydra").exists():
                record()
            (folder / FAULT).write_text("\n".join([said, "", *traceback.format_exception(error)]), encoding="utf-8")
        raise


def _objective(summary: Any, name: str | None) -> float | None:
    """The metric ``name`` of the final weights; which ones there are has been checked before training."""
    return None if name is None else float(summary["final"][name])


def _check_same(folder: Path, composed: Any) -> None:
    """Refuse to go on with a run that was started with other values than ``composed``; none is no fault.

    Raises:
        ConfigurationError: naming keys that differ.
    """
    file = folder / ".hydra" / "config.yaml"
    if not file.exists():
        return
    before, now = (_flat(values) for values in (OmegaConf.to_container(OmegaConf.load(file)), composed))
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
