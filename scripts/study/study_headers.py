"""Source code as tasks for a model that has read docstrings alone: torch's C++ headers, and the standard library."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterable
from pathlib import Path

import torch

from dynrank.app.tasks.data.splits import SPLITS, number_of, place

# Characters of a file, from a random place.
CHARACTERS = 1_200


def cpp_headers(seed: int = 0) -> dict[str, list[dict[str, str]]]:
    """A text of each header under torch/include but for generated ones."""
    root = Path(torch.__file__).parent / "include"
    files = (file for file in root.rglob("*.h") if not file.relative_to(root).as_posix().startswith("ATen/ops/"))
    return _texts(root, files, seed, shortest=1)


def python_code(seed: int = 0) -> dict[str, list[dict[str, str]]]:
    """A text of each file of the standard library of 600 characters or more."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = (file for file in root.rglob("*.py") if "site-packages" not in file.parts)
    return _texts(root, files, seed, shortest=601)


def _texts(root: Path, files: Iterable[Path], seed: int, shortest: int) -> dict[str, list[dict[str, str]]]:
    """A piece of each file; files, not pieces, fall into splits, 0.9 / 0.02 / 0.08."""
    splits: dict[str, list[dict[str, str]]] = {split: [] for split in SPLITS}
    for file in sorted(files):
        name = file.relative_to(root).as_posix()
        text = file.read_text(encoding="utf-8", errors="replace")
        if len(text) >= shortest:
            start = number_of(name, seed) % max(1, len(text) - CHARACTERS)
            splits[place(name, seed, 0.9, 0.92)].append({"text": text[start : start + CHARACTERS]})
    return splits
