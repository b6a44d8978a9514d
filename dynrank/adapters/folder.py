"""Where a stored adapter lies; without torch, so that a command can refuse a wrong place before it loads that."""

from pathlib import Path

from dynrank.errors import ConfigurationError

CONFIG_FILE = "adapter_config.json"


def adapter_folder(place: Path) -> Path:
    """The folder of an adapter: ``place`` itself, or ``adapter/`` in it if ``place`` is a run's folder."""
    inside = place / "adapter"
    return inside if (inside / CONFIG_FILE).exists() and not (place / CONFIG_FILE).exists() else place


def existing_adapter(place: Path) -> Path:
    """:func:`adapter_folder` of a place that has an adapter; a file is explained where it is read.

    Raises:
        ConfigurationError: if there is none.
    """
    folder = adapter_folder(place)
    is_file = folder.is_file() or folder.suffix == ".safetensors"
    if not is_file and not (folder / CONFIG_FILE).exists():
        found = "has no such file" if folder.is_dir() else "does not exist"
        raise ConfigurationError(
            f"{str(place)!r} must be the folder of an adapter, with {CONFIG_FILE} in it, or of the run that made it; "
            f"it {found}",
            "folder",
        )
    return folder
