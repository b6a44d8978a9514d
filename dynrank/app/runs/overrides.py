"""Errors of a command, in one message with an exit code: ours, Hydra's own, and keys that nothing reads."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from difflib import SequenceMatcher
from typing import Any

from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from dynrank.app.keys import arguments_of, known_keys, nodes_of
from dynrank.errors import PEFT_NAMES, ConfigurationError, DivergedError
from dynrank.output.whole_file import DISK_FULL


@contextmanager
def overrides_explained() -> Iterator[None]:
    """Turn errors of Hydra and OmegaConf inside the block into a ConfigurationError."""
    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigurationError(_explanation(error)) from error
    except ValueError as error:
        # Hydra's only error of a plain class about an override: schedule=null.
        if not str(error).startswith("Config group override"):
            raise
        raise ConfigurationError(f"{error}; name a choice of the group, such as schedule=fixed") from error


@contextmanager
def usage_errors() -> Iterator[None]:
    """Print a configuration error and exit with code 2; 1 for a full disk and a run that diverged, 130 after Ctrl-C.

    Any other failure keeps its traceback, and Python exits with 1.
    """
    try:
        with overrides_explained():
            yield
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except ConfigurationError as error:
        print(f"error: {error}", *getattr(error, "__notes__", ()), sep="; ", file=sys.stderr)
        is_full = getattr(error.__cause__, "errno", None) in DISK_FULL
        sys.exit(1 if is_full or isinstance(error, DivergedError) else 2)


def check_keys(config: DictConfig, known: Mapping[str, Any]) -> None:
    """Refuse keys that nothing reads; ``known`` has the keys, and below a group those that the group may have.

    In the other groups, keys are arguments of what ``_target_`` names; classes of others refuse wrong ones themselves.
    """
    groups = {f"{name}.": [*keys] for name, keys in known.items() if isinstance(keys, Mapping)}
    groups |= {"": [*known], "trainer.": [*(arguments_of("lightning.pytorch.Trainer") or ())]}
    for prefix, node in nodes_of(OmegaConf.to_container(config)):
        taken = groups.get(prefix) or arguments_of(str(node.get("_target_")))
        # Hydra's own keys begin with _.
        unread = [] if taken is None else [name for name in node if name not in taken and not name.startswith("_")]
        if unread:
            raise ConfigurationError(unknown_key(f"{prefix}{unread[0]}", config))


def _explanation(error: HydraException | OmegaConfBaseException) -> str:
    cause = error if isinstance(error, OmegaConfBaseException) else error.__cause__
    # Hydra refuses new keys outside of groups only.
    if isinstance(cause, ConfigAttributeError | ConfigKeyError) and isinstance(cause.parent_node, DictConfig):
        return unknown_key(str(cause.full_key), cause.parent_node)
    return str(error)


def unknown_key(key: str, config: DictConfig) -> str:
    """The message about a key that nothing reads, with the nearest keys of ``config``."""
    name = key.rpartition(".")[2]
    name = PEFT_NAMES.get(name, name)

    def likeness(other: str) -> float:
        last = SequenceMatcher(None, name, other.rpartition(".")[2]).ratio()
        return 2 * last + SequenceMatcher(None, key, other).ratio()

    known = {other for other in known_keys(config) if not other.startswith("hydra")} - {key}
    near = sorted(known, key=likeness, reverse=True)[:3]
    said = f"{key} is not a configuration key; nearest: {', '.join(near)}"
    if key in ("data.train", "data.val", "data.test"):
        # The default task has data of its own.
        said += "; for rows of your own choose task=classification, completion, chat or text"
    return said
