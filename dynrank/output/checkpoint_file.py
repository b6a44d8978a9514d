"""Checkpoint files, which are written completely or not at all, and are checked for damage before they are read.

The format is that of ``torch.save``: a zip file with checksums.
"""

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dynrank.errors import ConfigurationError
from dynrank.output.whole_file import whole_file


def write_checkpoint(checkpoint: Mapping[str, Any], path: str | Path) -> None:
    """Save ``checkpoint`` at ``path``; after an error or a crash, ``path`` holds the complete old or new file."""
    path = Path(path)
    # torch hides the reason of a failed write, so it writes to memory first. An adapter's state is small.
    content = io.BytesIO()
    torch.save(dict(checkpoint), content)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as part:
            part.write_bytes(content.getvalue())
    except OSError as error:
        raise ConfigurationError(
            f"cannot write the checkpoint {str(path)!r}: {error.strerror or error}; free space, or give another "
            "dirpath, and continue from the last checkpoint",
            "dirpath",
            "ckpt_path",
        ) from error


def read_checkpoint(path: str | Path, *, weights_only: bool = True) -> dict[str, Any]:
    """The contents of a checkpoint file, tensors on the CPU; ``weights_only=False`` runs code that is in the file."""
    path = Path(path)
    try:
        checkpoint = load_undamaged(path, weights_only=weights_only)
        if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), dict):
            raise ValueError("it has no state_dict")
    except OSError as error:
        raise ConfigurationError(f"cannot read the checkpoint {str(path)!r}: {error.strerror}", "ckpt_path") from None
    # A damaged or malicious file can make zipfile and pickle raise any error.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigurationError(
            f"{str(path)!r} is not a complete checkpoint of plain tensors: {reason:.200}", "ckpt_path"
        ) from None
    return checkpoint


def load_undamaged(file: Path | io.BytesIO, *, weights_only: bool = True) -> Any:
    """The object that ``torch.save`` has written to ``file``, after a check of its checksums."""
    with zipfile.ZipFile(file) as archive:
        broken = archive.testzip()
    if broken is not None:
        raise ValueError(f"{broken!r} is damaged")
    if isinstance(file, io.BytesIO):
        # zipfile has moved the position.
        file.seek(0)
    return torch.load(file, map_location="cpu", weights_only=weights_only)
