"""Errors in a user's overrides, in one line: Hydra's errors in our words, and keys that nothing reads."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from difflib import SequenceMatcher
from traceback import walk_tb
from types import NoneType, UnionType
from typing import Any, get_args

from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException, ValidationError

from dynrank.errors import ConfigurationError, configured

# {choice or key of version 0.2 that was removed: what to write instead}.
GONE = {
    "schedule/budget": "schedule=early_budget (early), or schedule=after_convergence",
    "schedule/halving_on_plateau": "schedule=after_convergence schedule.drops=2",
    "schedule/squeeze_at_end": "schedule=milestones schedule.ranks=[8] schedule.at=[1.0]",
    "schedule/squeeze_then_tune": "schedule=milestones schedule.ranks=[8] schedule.at=[0.9]",
    "schedule/grow_then_shrink": "schedule=stages with the stages of both in a file of your own",
    "schedule/one_stage": "schedule=stages with the stage in a file of your own",
    "schedule/target": "schedule=stages with the target in a file of your own",
    "schedule/trigger/slope": "schedule/trigger=plateau",
    "schedule/trigger/subspace": "schedule/trigger=plateau",
    "schedule/trigger/tail_energy": "schedule/trigger=plateau",
    "lora.capacity": "nothing: a compiled model is compiled again for every rank",
    "schedule.shape": "nothing: every cut of anneal is by the same factor",
    "schedule.how.rewarmup_steps": "nothing: the learning rate has no ramp after a change",
    "schedule.check_batches": "nothing: auto validates all validation data, after the last step alone",
}
_PLUGINS = ("hydra/sweeper/optuna", "hydra/launcher/joblib", "hydra/launcher/submitit")
_HYDRA = ("hydra", "hydra_plugins", "omegaconf", "antlr4", "yaml")
_TYPES = {int: "an int", float: "a number", bool: "true or false", str: "a text", NoneType: "null"}


@contextmanager
def overrides_explained() -> Iterator[None]:
    """Turn errors of Hydra and OmegaConf inside the block into a ConfigurationError of one line.

    This includes the OSError of Hydra if it cannot make the folder of a run or a sweep.
    """
    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        with configured():
            raise ConfigurationError(_explanation(error)) from error
    except (ValueError, OSError) as error:
        if not _raised_by_hydra(error):
            raise
        if isinstance(error, OSError):
            said = f"the folder {error.filename!r} cannot be made: {error.strerror}; set hydra.run.dir (of a sweep "
            raise ConfigurationError(f"{said}hydra.sweep.dir) to another one") from error
        raise ConfigurationError(
            f"{error}; a group takes a name, such as schedule=fixed (--help lists them)"
        ) from error


def check_keys(config: DictConfig) -> None:
    """Refuse keys from ``+key=value`` or a user's own file that nothing reads.

    A group whose ``_target_`` names a class may have any other key here, because the class itself refuses unknown ones.
    """
    own_schedule = not str(config.schedule.get("_target_")).startswith("dynrank.")
    removed = (key for key in _keys(config) if key in GONE and not (own_schedule and key.startswith("schedule.")))
    for key in (*removed, *_unread(config)):
        raise ConfigurationError(unknown_key(key, config))


def _unread(node: DictConfig, prefix: str = "") -> Iterator[str]:
    """Keys of typed nodes that are not fields of the node's dataclass."""
    kind = OmegaConf.get_type(node)
    if kind is None or not is_dataclass(kind):
        return
    known = {field.name for field in fields(kind)}
    for name, child in _children(node):
        if name not in known:
            yield f"{prefix}{name}"
        elif child is not None:
            yield from _unread(child, f"{prefix}{name}.")


def _explanation(error: HydraException | OmegaConfBaseException) -> str:
    cause = error if isinstance(error, OmegaConfBaseException) else error.__cause__
    if isinstance(cause, ConfigAttributeError | ConfigKeyError) and isinstance(cause.parent_node, DictConfig):
        key, parent = str(cause.full_key), cause.parent_node
        is_final = key in GONE or is_dataclass(OmegaConf.get_type(parent))
        advice = "" if is_final else f"; to pass a new one on, write +{key}=..."
        return unknown_key(key, parent._get_root()) + advice
    if isinstance(cause, ValidationError) and is_dataclass(cause.object_type):
        wanted = next(field.type for field in fields(cause.object_type) if field.name == cause.key)
        kinds = get_args(wanted) if isinstance(wanted, UnionType) else (wanted,)
        words = " or ".join(_TYPES.get(kind, str(kind)) for kind in kinds)
        return f"{cause.full_key} must be {words}, got {cause.value!r}"
    name = str(error.missing_cfg_file) if isinstance(error, MissingConfigException) else ""
    if name in GONE:
        return _gone(name)
    return f"{error}\nit comes with pip install 'dynrank[sweep]'" if name.startswith(_PLUGINS) else str(error)


def unknown_key(key: str, config: Any) -> str:
    """The message about a key that nothing reads, with the nearest keys of ``config``."""
    if key in GONE:
        return _gone(key)
    name = key.rpartition(".")[2]
    # Initials also match: learning_rate gives lr.
    initials = "".join(word[:1] for word in name.split("_"))

    def likeness(other: str) -> float:
        last = other.rpartition(".")[2]
        alike = 1.0 if last == initials else SequenceMatcher(None, name, last).ratio()
        return 2 * alike + SequenceMatcher(None, key, other).ratio()

    known = {other for other in _keys(config) if not other.startswith("hydra")} - {key}
    near = sorted(known, key=likeness, reverse=True)[:3]
    return f"{key} is not a configuration key; nearest: {', '.join(near)}"


def _gone(name: str) -> str:
    return f"{name} was removed in version 0.3; write {GONE[name]}"


def _keys(node: DictConfig, prefix: str = "") -> Iterator[str]:
    for name, child in _children(node):
        yield f"{prefix}{name}"
        if child is not None:
            yield from _keys(child, f"{prefix}{name}.")


def _children(node: DictConfig) -> Iterator[tuple[str, DictConfig | None]]:
    """(key, its value if that is a mapping, otherwise None) for every key of ``node``."""
    for name in map(str, node):
        child = node._get_node(name)
        yield name, child if isinstance(child, DictConfig) and not child._is_none() else None


def _raised_by_hydra(error: Exception) -> bool:
    """Whether Hydra or one of its parsers raised an error of a built-in type, as for ``schedule=null``."""
    packages = [frame.f_globals["__name__"].partition(".")[0] for frame, _ in walk_tb(error.__traceback__)]
    return [name for name in packages if name not in sys.stdlib_module_names][-1] in _HYDRA
