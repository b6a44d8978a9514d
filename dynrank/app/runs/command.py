"""The command that started a run, from .hydra/ in its folder."""

import re
import shlex
from pathlib import Path
from typing import Any

import yaml

from dynrank.app.runs.config import CONFIG_NAME


def read_overrides(folder: Path) -> list[str] | None:
    """The overrides of the run in ``folder``, in Hydra's syntax; None: not recorded."""
    file = folder / ".hydra" / "overrides.yaml"
    return yaml.safe_load(file.read_text(encoding="utf-8")) if file.exists() else None


def command(folder: Path, *changes: str) -> str | None:
    """The command of the run in ``folder``, with ``changes`` instead of the overrides they replace; None: not recorded.

    ``ckpt_path=last`` is left out, because it is for one folder only.
    """
    overrides = read_overrides(folder)
    if overrides is None:
        return None
    replaced = {change.partition("=")[0] for change in changes}
    kept = [given for given in overrides if given != "ckpt_path=last" and given.partition("=")[0] not in replaced]
    return shlex.join(["dynrank-train", *_options(folder), *kept, *changes])


def override(key: str, value: object) -> str:
    """``key=value`` in Hydra's syntax."""
    text = str(value)
    # Hydra takes only these characters without quotes.
    return f"{key}={text}" if re.fullmatch(r"[a-zA-Z0-9_./-]+", text) else f"{key}='" + text.replace("'", r"\'") + "'"


def _options(folder: Path) -> list[str]:
    """The options that name configuration files; folders as seen from where the run was started if they lie there."""
    file = folder / ".hydra" / "hydra.yaml"
    if not file.exists():
        return []
    hydra: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))["hydra"]
    start = Path(hydra["runtime"]["cwd"])
    name = hydra["job"]["config_name"]
    options = ["--config-name", name] if name != CONFIG_NAME else []
    for source in hydra["runtime"]["config_sources"]:
        if source["provider"] == "command-line":
            path = Path(source["path"])
            options += ["--config-dir", str(path.relative_to(start) if path.is_relative_to(start) else path)]
    return options + [given for given in hydra["overrides"]["hydra"] if given.startswith("hydra.searchpath=")]
