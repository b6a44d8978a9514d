"""The keys and options of the application: which of them an error of the library is about."""

import ast
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, wraps
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

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


def keys_of(config: DictConfig, group: str = "") -> Callable[[str], str | None]:
    """For :func:`named`: the key of a composed configuration, or of its node ``group``, that sets an argument."""

    def key_of(argument: str) -> str | None:
        name = _OTHER_NAMES.get(argument, argument)
        if name.startswith("hydra."):
            return name
        # An index of a value follows the key: ranks[1].
        plain = re.sub(r"\[.*", "", name)
        known = known_keys(config, f"{group}." if group else "")
        found = [f"{key}{name.removeprefix(plain)}" for key in known if f".{key}".endswith(f".{plain}")]
        return min(found, key=_order, default=None)

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
    yield from (f"{prefix}{name}" for name in arguments_of(str(node.get("_target_"))) or ())
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


@cache
def arguments_of(target: str) -> tuple[str, ...] | None:
    """The arguments of a class or function of dynrank or Lightning by its dotted name; None: unknown, or any.

    They are read from its file, because an import would load torch, and a wrong key must be refused at once.
    """
    module, _, name = target.rpartition(".")
    for node in _statements(module):
        if isinstance(node, ast.ImportFrom):
            known = {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            if name in known:
                return arguments_of(known[name])
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return _parameters(node)
        if isinstance(node, ast.ClassDef) and node.name == name:
            for made in node.body:
                if isinstance(made, ast.FunctionDef) and made.name == "__init__":
                    of_init = _parameters(made)
                    return of_init and of_init[1:]
            # A dataclass takes its fields, and those of its bases first.
            bases = [arguments_of(f"{module}.{base.id}") or () for base in node.bases if isinstance(base, ast.Name)]
            fields = [part.target for part in node.body if isinstance(part, ast.AnnAssign)]
            own = [field.id for field in fields if isinstance(field, ast.Name) and not field.id.startswith("_")]
            return tuple(dict.fromkeys([*(name for of_base in bases for name in of_base), *own]))
    return None


def _parameters(function: ast.FunctionDef) -> tuple[str, ...] | None:
    taken = function.args
    return None if taken.kwarg else tuple(part.arg for part in (*taken.posonlyargs, *taken.args, *taken.kwonlyargs))


def _statements(module: str) -> list[ast.stmt]:
    package, *parts = module.split(".")
    spec = find_spec(package) if package in ("dynrank", "lightning") else None
    if spec is None or not spec.submodule_search_locations:
        return []
    place = Path(spec.submodule_search_locations[0], *parts)
    file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
    return ast.parse(file.read_text(encoding="utf-8")).body if file.exists() else []
