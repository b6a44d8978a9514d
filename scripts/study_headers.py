"""The C++ headers that torch is installed with, as a task for a model that has read English and Python alone."""

from __future__ import annotations

from pathlib import Path

import torch

from dynrank.tasks.data.splits import SPLITS, number_of, place

# Characters of a file, from a random place.
CHARACTERS = 1_200


def cpp_headers(seed: int = 0) -> dict[str, list[dict[str, str]]]:
    """A text of each header under torch/include but for generated ones; files fall into splits, 0.9 / 0.02 / 0.08."""
    root = Path(torch.__file__).parent / "include"
    splits: dict[str, list[dict[str, str]]] = {split: [] for split in SPLITS}
    for file in sorted(root.rglob("*.h")):
        name = file.relative_to(root).as_posix()
        text = file.read_text(encoding="utf-8", errors="replace")
        if not name.startswith("ATen/ops/") and text:
            start = number_of(name, seed) % max(1, len(text) - CHARACTERS)
            splits[place(name, seed, 0.9, 0.92)].append({"text": text[start : start + CHARACTERS]})
    return splits
