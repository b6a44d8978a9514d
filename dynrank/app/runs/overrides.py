"""Errors of a command, in one message with an exit code: ours, Hydra's own, and keys that nothing reads."""

import errno
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from difflib import SequenceMatcher
from inspect import signature
from typing import Any

from hydra.errors import HydraException, MissingConfigException
from hydra.utils import get_object
from omegaconf import DictConfig
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from dynrank.errors import PEFT_NAMES, ConfigurationError, DivergedError, configured

# The numbers of the errors of a disk that is full.
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_PLUGINS = ("hydra/sweeper/optuna", "hydra/launcher/joblib", "hydra/launcher/submitit")
_OWN_DATA = "data.train, val and test are for your own data: choose task=classification, completion, chat or text"


@contextmanager
def overrides_explained() -> Iterator[None]:
    """Turn errors of Hydra and OmegaConf inside the block into a ConfigurationError."""
    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        with configured():
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
        with configured(), overrides_explained():
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

    In the other groups the class or function of ``_target_`` refuses what it does not know.
    """
    shipped = str(config.data.get("_target_")).startswith("dynrank.") if config.get("data") else False
    if shipped and not config.data._target_.endswith(".from_files") and {"train", "val", "test"} & {*config.data}:
        raise ConfigurationError(_OWN_DATA)
    for name, node in _children(config):
        inner: Any = known.get(name)
        if name not in known:
            raise ConfigurationError(unknown_key(name, config))
        wrong = [key for key, _ in _children(node) if key not in inner] if node is not None and inner else []
        if wrong:
            raise ConfigurationError(unknown_key(f"{name}.{wrong[0]}", config))


def _explanation(error: HydraException | OmegaConfBaseException) -> str:
    cause = error if isinstance(error, OmegaConfBaseException) else error.__cause__
    if isinstance(cause, ConfigAttributeError | ConfigKeyError) and isinstance(cause.parent_node, DictConfig):
        return unknown_key(str(cause.full_key), cause.parent_node._get_root())
    name = str(error.missing_cfg_file) if isinstance(error, MissingConfigException) else ""
    return f"{error}\nit comes with pip install 'dynrank[sweep]'" if name.startswith(_PLUGINS) else str(error)


def unknown_key(key: str, config: Any) -> str:
    """The message about a key that nothing reads, with the nearest keys of ``config``."""
    name = key.rpartition(".")[2]
    # Initials also match: learning_rate gives lr.
    initials = "".join(word[:1] for word in name.split("_"))

    def likeness(other: str) -> float:
        last = other.rpartition(".")[2]
        alike = 1.0 if last in (initials, PEFT_NAMES.get(name)) else SequenceMatcher(None, name, last).ratio()
        return 2 * alike + SequenceMatcher(None, key, other).ratio()

    known = {other for other in _keys(config) if not other.startswith("hydra")} - {key}
    near = sorted(known, key=likeness, reverse=True)[:3]
    return f"{key} is not a configuration key; nearest: {', '.join(near)}"


def _keys(node: DictConfig, prefix: str = "") -> Iterator[str]:
    """Every key of ``node``, and every argument of what a ``_target_`` of dynrank names."""
    if str(node.get("_target_")).startswith("dynrank."):
        yield from (f"{prefix}{name}" for name in signature(get_object(node._target_)).parameters)
    for name, child in _children(node):
        yield f"{prefix}{name}"
        if child is not None:
            yield from _keys(child, f"{prefix}{name}.")


def _children(node: DictConfig) -> Iterator[tuple[str, DictConfig | None]]:
    """(key, its value if that is a mapping, otherwise None) for every key of ``node``."""
    for name in map(str, node):
        child = node._get_node(name)
        yield name, child if isinstance(child, DictConfig) and not child._is_none() else None
