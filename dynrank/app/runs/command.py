"""The command that started a run, from .hydra/ in its folder."""

import shlex
from pathlib import Path
from typing import Any

import yaml

from dynrank.app.runs.config import CONFIG_NAME


def read_overrides(folder: Path) -> list[str] | None:
    """The overrides of the run in ``folder``, in Hydra's syntax; None: not recorded."""
    file = folder / ".hydra" / "overrides.yaml"
    return yaml.safe_load(file.read_text(encoding="utf-8")) if file.exists() else None


def command(folder: Path) -> str | None:
    """The command of the run in ``folder``; None: not recorded. ``ckpt_path=last`` is for one folder only."""
    overrides = read_overrides(folder)
    if overrides is None:
        return None
    return shlex.join(["dynrank-train", *_options(folder), *(one for one in overrides if one != "ckpt_path=last")])


def _options(folder: Path) -> list[str]:
    """The options that name configuration files; folders as seen from where the run was started if they lie there."""
    hydra: dict[str, Any] = yaml.safe_load((folder / ".hydra" / "hydra.yaml").read_text(encoding="utf-8"))["hydra"]
    start = Path(hydra["runtime"]["cwd"])
    name = hydra["job"]["config_name"]
    options = ["--config-name", name] if name != CONFIG_NAME else []
    for source in hydra["runtime"]["config_sources"]:
        if source["provider"] == "command-line":
            path = Path(source["path"])
            options += ["--config-dir", str(path.relative_to(start) if path.is_relative_to(start) else path)]
    return options
