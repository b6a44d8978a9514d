"""Errors of a command, in one message with an exit code: ours, Hydra's own, and keys that nothing reads."""

import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from difflib import SequenceMatcher
from typing import Any

from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from dynrank.app.keys import arguments_of, children, known_keys
from dynrank.errors import PEFT_NAMES, ConfigurationError, DivergedError
from dynrank.output.whole_file import DISK_FULL

_TRAINER = "lightning.pytorch.Trainer"
_OWN_DATA = "data.train, val and test are for your own data: choose task=classification, completion, chat or text"


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
    shipped = str(config.data.get("_target_")).startswith("dynrank.") if config.get("data") else False
    if shipped and not config.data._target_.endswith(".from_files") and {"train", "val", "test"} & {*config.data}:
        raise ConfigurationError(_OWN_DATA)
    for name, node in children(config):
        if name not in known:
            raise ConfigurationError(unknown_key(name, config))
        taken = arguments_of(_TRAINER) if name == "trainer" else known[name]
        for key in _unread(node, f"{name}.", taken) if node is not None else ():
            raise ConfigurationError(unknown_key(key, config))


def _unread(node: DictConfig, prefix: str, taken: Collection[str] | None = None) -> Iterator[str]:
    """The keys of ``node`` that are not ``taken``, or no arguments of what its ``_target_`` names, and those inside."""
    taken = taken or arguments_of(str(node.get("_target_")))
    for name, child in children(node):
        # A mapping in a list is a value, and Hydra's own keys begin with _.
        if taken is not None and "[" not in name and not name.startswith("_") and name not in taken:
            yield f"{prefix}{name}"
        elif child is not None:
            yield from _unread(child, f"{prefix}{name}.")


def _explanation(error: HydraException | OmegaConfBaseException) -> str:
    cause = error if isinstance(error, OmegaConfBaseException) else error.__cause__
    if isinstance(cause, ConfigAttributeError | ConfigKeyError) and isinstance(cause.parent_node, DictConfig):
        key = str(cause.full_key)
        # A dot for each level leads to the whole configuration.
        return unknown_key(key, OmegaConf.select(cause.parent_node, "." * (key.count(".") + 1)))
    return str(error)


def unknown_key(key: str, config: DictConfig) -> str:
    """The message about a key that nothing reads, with the nearest keys of ``config``."""
    name = key.rpartition(".")[2]
    # Initials also match: learning_rate gives lr.
    initials = "".join(word[:1] for word in name.split("_"))

    def likeness(other: str) -> float:
        last = other.rpartition(".")[2]
        alike = 1.0 if last in (initials, PEFT_NAMES.get(name)) else SequenceMatcher(None, name, last).ratio()
        return 2 * alike + SequenceMatcher(None, key, other).ratio()

    known = {other for other in known_keys(config) if not other.startswith("hydra")} - {key}
    near = sorted(known, key=likeness, reverse=True)[:3]
    return f"{key} is not a configuration key; nearest: {', '.join(near)}"
