"""The keys and options of the application: which of them an error of the library is about."""

import ast
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, wraps
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar, cast

from omegaconf import DictConfig, OmegaConf

from dynrank.errors import ConfigurationError

F = TypeVar("F", bound=Callable[..., Any])

# Where the key is not called as the argument: {argument: key}.
_OTHER_NAMES = {
    "dirpath": "hydra.run.dir",
    "folder": "lora.from",
    "model": "task.model",
    "optimizer": "optimizer.name",
    "optimizers": "optimizer.name",
}


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


def keys_of(config: DictConfig) -> Callable[[str], str | None]:
    """For :func:`named`: the key of a composed configuration that sets an argument.

    If several keys have its name, it is the one with the fewest dots, and of these the first.
    """

    def key_of(argument: str) -> str | None:
        name = _OTHER_NAMES.get(argument, argument)
        if name.startswith("hydra."):
            return name
        # An index of a value follows the key: ranks[1].
        name, *index = name.partition("[")
        found = [key for key in known_keys(config) if f".{key}".endswith(f".{name}")]
        return "".join([min(found, key=lambda key: key.count(".")), *index]) if found else None

    return key_of


def names_keys(function: F) -> F:
    """Make the errors of a function, whose first argument is a composed configuration, name its keys."""

    @wraps(function)
    def naming(config: DictConfig, *args: Any, **kwargs: Any) -> Any:
        with named(keys_of(config)):
            return function(config, *args, **kwargs)

    return cast(F, naming)


def known_keys(config: DictConfig) -> list[str]:
    """Every key of ``config``, and every argument of what a ``_target_`` of dynrank names."""
    found = []
    for prefix, node in nodes_of(OmegaConf.to_container(config)):
        found += [f"{prefix}{name}" for name in (*(arguments_of(str(node.get("_target_"))) or ()), *node)]
    return found


def nodes_of(node: Any, prefix: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(what comes before its keys, the mapping) for a plain mapping and each one inside, also in its lists."""
    if isinstance(node, Mapping):
        yield prefix, node
    for name, value in node.items() if isinstance(node, Mapping) else ():
        parts = {f"{name}[{index}]": part for index, part in enumerate(value)} if isinstance(value, list) else {}
        for place, part in (parts or {name: value}).items():
            yield from nodes_of(part, f"{prefix}{place}.")


@cache
def arguments_of(target: str) -> tuple[str, ...] | None:
    """The arguments of a class or function of dynrank or Lightning by its dotted name; None: unknown, or any.

    They are read from its file, because an import would load torch, and a wrong key must be refused at once.
    """
    module, _, name = target.rpartition(".")
    for node in _statements(module):
        if isinstance(node, ast.ImportFrom) and name in {alias.name for alias in node.names}:
            return arguments_of(f"{node.module}.{name}")
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return _parameters(node)
        if isinstance(node, ast.ClassDef) and node.name == name:
            for made in node.body:
                if isinstance(made, ast.FunctionDef) and made.name == "__init__":
                    return (_parameters(made) or ())[1:] or None
            # A dataclass takes the fields of its bases first, and its own.
            found = [arguments_of(f"{module}.{ast.unparse(base)}") or () for base in node.bases]
            fields = [ast.unparse(part.target) for part in node.body if isinstance(part, ast.AnnAssign)]
            own = tuple(field for field in fields if not field.startswith("_"))
            return tuple(dict.fromkeys(sum(found, ()) + own))
    return None


def _parameters(function: ast.FunctionDef) -> tuple[str, ...] | None:
    taken = function.args
    return None if taken.kwarg else tuple(part.arg for part in (*taken.posonlyargs, *taken.args, *taken.kwonlyargs))


def _statements(module: str) -> list[ast.stmt]:
    package, *parts = module.split(".")
    spec = find_spec(package) if package in ("dynrank", "lightning") else None
    if spec is None or spec.origin is None:
        return []
    place = Path(spec.origin).parent.joinpath(*parts)
    file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
    return ast.parse(file.read_text(encoding="utf-8")).body if file.exists() else []
