"""Checkpoint files that are whole or not there, and are read only if undamaged.

A file is what ``torch.save`` writes: a zip file, which holds a checksum of everything in it.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dynrank.errors import ConfigurationError
from dynrank.output.whole_file import whole_file


def write_checkpoint(checkpoint: Mapping[str, Any], path: str | Path) -> None:
    """Save ``checkpoint`` at ``path``: whatever happens on the way, ``path`` holds it whole, or what it held before."""
    path = Path(path)
    # torch hides why a write to a file has failed, so it writes to memory first: an adapter's state is small.
    content = io.BytesIO()
    torch.save(dict(checkpoint), content)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as part:
            part.write_bytes(content.getbuffer())
    except OSError as error:
        raise ConfigurationError(
            f"cannot write the checkpoint {str(path)!r}: {error.strerror or error}; make room, or set hydra.run.dir "
            "(the callback's dirpath) to another disk. What was written before is whole: go on from it with ckpt_path"
        ) from None


def read_checkpoint(path: str | Path, *, weights_only: bool = True) -> dict[str, Any]:
    """The contents of a checkpoint file, tensors on the CPU.

    Args:
        path: written by :func:`write_checkpoint`, or by Lightning.
        weights_only: refuse to execute code from the file; for files that you trust only, False.
    """
    path = Path(path)
    try:
        checkpoint = load_undamaged(path, weights_only=weights_only)
        if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), dict):
            raise ValueError("there is no state_dict in it")
    except OSError as error:
        raise ConfigurationError(f"cannot read the checkpoint {str(path)!r}: {error.strerror}; set ckpt_path") from None
    # A damaged or malicious file can make zipfile and pickle raise anything.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigurationError(
            f"{str(path)!r} is not a whole checkpoint of plain tensors: {reason:.200}; set ckpt_path"
        ) from None
    return checkpoint


def load_undamaged(file: Path | io.BytesIO, *, weights_only: bool = True) -> Any:
    """What ``torch.save`` has written to ``file``."""
    with zipfile.ZipFile(file) as archive:
        broken = archive.testzip()
    if broken is not None:
        raise ValueError(f"{broken!r} is damaged")
    if isinstance(file, io.BytesIO):
        # zipfile leaves the file at another position.
        file.seek(0)
    return torch.load(file, map_location="cpu", weights_only=weights_only)
