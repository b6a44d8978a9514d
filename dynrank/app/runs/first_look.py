"""What a command refuses before it loads PyTorch, transformers and Lightning, which take seconds.

Nothing here decides more than the parts of a run that read the same files later.
"""

from pathlib import Path

from omegaconf import DictConfig

from dynrank.app.keys import names_keys
from dynrank.app.models.names import model_source
from dynrank.app.runs.config import plain, rank_pattern
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
        # This import takes a second. The files are read again from the cache of ``datasets``.
        from dynrank.app.tasks.data.columns import find_columns
        from dynrank.app.tasks.data.source import read_source

        for split in ("train", "val", "test"):
            if data.get(split) is not None and data.get("form"):
                raw = read_source(data[split], f"data.{split}", split)
                find_columns(raw.rows.column_names, data.get("columns") or {}, data["form"], raw.where)
