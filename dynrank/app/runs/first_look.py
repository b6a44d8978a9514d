"""What a command refuses before it loads PyTorch, transformers and Lightning, which take seconds.

Nothing here decides more than the parts of a run that read the same files later.
"""

import csv
import json
from collections.abc import Mapping
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from dynrank.app.keys import names_keys
from dynrank.app.models.names import model_source
from dynrank.app.runs.config import plain, rank_pattern
from dynrank.app.tasks.data.columns import KINDS, TABLES, find_columns, heading_of
from dynrank.errors import ConfigurationError


@names_keys
def look(config: DictConfig) -> None:
    """Refuse files that are not there, and columns that a file lacks.

    Raises:
        ConfigurationError: if there is one.
    """
    rank_pattern(config.rank_map)
    place = config.ckpt_path
    if place not in (None, "last") and not Path(place).exists():
        raise ConfigurationError(f"the checkpoint {place!r} does not exist; set ckpt_path")
    task = str(config.task and config.task.get("_target_"))
    # A class of the user's own may have other models.
    if task.startswith("dynrank.") and isinstance(config.task.get("model"), str):
        model_source(config.task.model)
    data = plain(config.data) or {}
    if str(data.get("_target_")).endswith(".from_files"):
        for split in ("train", "val", "test"):
            if isinstance(data.get(split), str):
                _look_at(data[split], f"data.{split}", data)


def _look_at(name: str, key: str, data: Mapping[str, Any]) -> None:
    path = Path(name).expanduser()
    # ORG/NAME may be on the hub.
    if not path.exists() and (path.suffix in KINDS or name.count("/") != 1):
        kinds = f"a file ({', '.join(KINDS)}), or ORG/NAME on the hub"
        raise ConfigurationError(f"{key}={name} does not exist; set {key} to {kinds}")
    columns = _columns(path) if path.is_file() else []
    if columns and data.get("form"):
        find_columns(columns, data.get("columns") or {}, data["form"], f"{key}={name}")


def _columns(path: Path) -> list[str]:
    """The columns in the heading of a table, or in its first 1000 rows; none if they cannot be read so simply."""
    kind = path.suffix.lower()
    # What cannot be read is explained where it is read.
    with suppress(ValueError, csv.Error):
        if kind in TABLES:
            line, _, names = heading_of(path)
            # A name of two lines has an open quote in the first.
            return [] if line.count('"') % 2 else names
        if kind in (".jsonl", ".ndjson"):
            with path.open(encoding="utf-8-sig") as file:
                rows = [json.loads(line) for line in islice(file, 1000) if line.strip()]
            return [*dict.fromkeys(name for row in rows if isinstance(row, dict) for name in row)]
    return []
