"""A run that goes on from an adapter (``lora.from``): whether it is on the same base, and what becomes of the ranks."""

import re
from pathlib import Path

from lightning.pytorch import LightningModule
from omegaconf import DictConfig

from dynrank.adapters.base import read_base
from dynrank.adapters.config import AdapterConfig
from dynrank.adapters.folder import CONFIG_FILE
from dynrank.adapters.stored import read_json
from dynrank.app.models.names import model_source, public_name
from dynrank.callbacks import RankScheduler
from dynrank.errors import ConfigurationError
from dynrank.layers.finding import lora_layers
from dynrank.output.console import span

# The revision on the hub if none is named.
_MAIN = "main"
# The name of a model in the path of its snapshot in the hub's cache.
_SNAPSHOT = re.compile(r"models--.*--(?P<name>[^/]+)/snapshots/[^/]+/?$")


def check_base_name(adapter: Path, model: str, revision: str | None) -> None:
    """Refuse the adapter in a folder if it names another base than ``model``, the run's ``task.model``.

    On the hub it must not name another revision, either; ``revision`` is the run's. An adapter that knows the weights
    of its base is compared by these, when they are loaded.
    """
    if read_base(adapter).fingerprints:
        return
    config = read_json(AdapterConfig, adapter / CONFIG_FILE)
    base = str(config.base_model_name_or_path or "")
    if base and not _same(base, model):
        raise ConfigurationError(
            f"the adapter {str(adapter)!r} (lora.from) names the base {base!r}, and the run has task.model={model}; "
            f"set task.model to that base, or if both are the same model, write the second name into {CONFIG_FILE}"
        )
    trained_on = config.revision or revision or _MAIN
    if trained_on != (revision or _MAIN) and not Path(model_source(model)).exists():
        raise ConfigurationError(
            f"the adapter {str(adapter)!r} (lora.from) was trained on revision {trained_on!r} of its base, and the run "
            f"has model.revision={revision or 'null'}; set model.revision={trained_on}"
        )


def _same(base: str, model: str) -> bool:
    """Whether both names may mean one model: the folder or the hub's name is the same, or the last part of both."""
    ours = public_name(model_source(model))
    place = Path(base).expanduser()
    theirs = public_name(str(place.resolve())) if place.exists() else base
    if theirs == ours or (Path(theirs).exists() and Path(ours).exists()):
        return theirs == ours
    return _last_part(theirs) == _last_part(ours)


def _last_part(name: str) -> str:
    snapshot = _SNAPSHOT.search(name)
    return (snapshot["name"] if snapshot else name.rstrip("/").rpartition("/")[2]).casefold()


def ranks_from(module: LightningModule, scheduler: RankScheduler, schedule: DictConfig) -> str:
    """The ranks from which a run goes on, and what becomes of them."""
    ranks = f"at rank {span([layer.rank for _, layer in lora_layers(module)])}"
    if not scheduler.driver.stages:
        return f"{ranks}; the ranks stay, as no schedule was chosen that changes them (schedule=early_budget does)"
    return f"{ranks}, which the schedule {schedule._target_.rpartition('.')[2]} changes"
