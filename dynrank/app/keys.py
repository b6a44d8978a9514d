"""The keys and options of the application: which of them an error of the library is about."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from inspect import signature
from typing import Any, Concatenate, ParamSpec, TypeVar

from hydra.utils import get_object
from omegaconf import DictConfig, ListConfig, OmegaConf

from dynrank.errors import ConfigurationError

P = ParamSpec("P")
T = TypeVar("T")

# Where the key is not called as the argument: {argument: key}.
_OTHER_NAMES = {
    "dirpath": "hydra.run.dir",
    "folder": "lora.from",
    "model": "task.model",
    "optimizer": "optimizer.name",
    "optimizers": "optimizer.name",
}
# If several groups have a key of a name, the argument is that of the first of these; keys outside of groups come first.
_GROUPS = ("schedule", "lora", "rank_map", "optimizer", "trainer", "task", "data", "model")


@contextmanager
def named(name: Callable[[str], str | None]) -> Iterator[None]:
    """Add to an error of the block what the user calls its arguments, unless a block inside has done so.

    ``name`` gives the key or option of an argument; None: the user cannot set it.
    """
    try:
        yield
    except ConfigurationError as error:
        names = dict.fromkeys(filter(None, map(name, error.arguments)))
        if names:
            said = ", ".join(names)
            error.args = (f"{error}\nset {said}" if "\n" in str(error) else f"{error} ({said})",)
            error.arguments = ()
        raise


def below(node: str) -> Callable[[str], str]:
    """For :func:`named`: the arguments are keys of the group or node."""
    return lambda argument: f"{node}.{argument}"


def keys_of(config: DictConfig, group: str = "", made: str = "") -> Callable[[str], str | None]:
    """For :func:`named`: the key of a composed configuration, or of its node ``group``, that sets an argument.

    ``made`` is the node whose object was being made. Its keys come before all others.
    """

    def key_of(argument: str) -> str | None:
        name = _OTHER_NAMES.get(argument, argument)
        if name.startswith("hydra."):
            return name
        # An index of a value follows the key: ranks[1].
        plain = re.sub(r"\[.*", "", name)
        known = known_keys(config, f"{group}." if group else "")
        found = [f"{key}{name.removeprefix(plain)}" for key in known if f".{key}".endswith(f".{plain}")]
        return min(found, key=lambda key: (not key.startswith(f"{made}."), _order(key)), default=None)

    return key_of


def _order(key: str) -> tuple[int, int]:
    group, _, rest = key.partition(".")
    if not rest:
        return -1, 0
    return _GROUPS.index(group) if group in _GROUPS else len(_GROUPS), key.count(".")


def names_keys(function: Callable[Concatenate[DictConfig, P], T]) -> Callable[Concatenate[DictConfig, P], T]:
    """Make the errors of a function, whose first argument is a composed configuration, name its keys."""

    @wraps(function)
    def naming(config: DictConfig, /, *args: P.args, **kwargs: P.kwargs) -> T:
        with named(keys_of(config)):
            return function(config, *args, **kwargs)

    return naming


def known_keys(node: DictConfig, prefix: str = "") -> Iterator[str]:
    """Every key of ``node``, and every argument of what a ``_target_`` of dynrank names."""
    target = str(node.get("_target_"))
    if target.startswith("dynrank."):
        # A wrong name has its own error.
        with suppress(ImportError, AttributeError, ValueError):
            yield from (f"{prefix}{name}" for name in signature(get_object(target)).parameters)
    for name, child in children(node):
        yield f"{prefix}{name}"
        if child is not None:
            yield from known_keys(child, f"{prefix}{name}.")


def children(node: DictConfig) -> Iterator[tuple[str, DictConfig | None]]:
    """(key, its value if that is a mapping, otherwise None) for each key of ``node`` and each mapping in its lists."""
    for key in node:
        value = _value(node, key)
        name = str(key)
        yield name, value if isinstance(value, DictConfig) else None
        if isinstance(value, ListConfig):
            parts = ((f"{name}[{index}]", _value(value, index)) for index in range(len(value)))
            yield from ((place, part) for place, part in parts if isinstance(part, DictConfig))


def _value(node: DictConfig | ListConfig, key: Any) -> Any:
    """The value of a key; None for one that is missing or refers to another key."""
    return None if OmegaConf.is_missing(node, key) or OmegaConf.is_interpolation(node, key) else node[key]
