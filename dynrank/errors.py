"""The one error for what a user wrote, and pydantic's faults turned into it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import field, fields, is_dataclass
from difflib import get_close_matches
from functools import wraps
from inspect import signature
from typing import Any, ParamSpec, TypeVar, dataclass_transform, get_args

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, validate_call
from pydantic.dataclasses import dataclass
from pydantic_core import to_json

C = TypeVar("C", bound=type)
T = TypeVar("T")
P = ParamSpec("P")

# Strict: a bool is no int and a text no number; YAML and Python have said what they mean.
STRICT = ConfigDict(strict=True, extra="forbid", arbitrary_types_allowed=True)


_WORDS = {  # of pydantic's messages
    "Input should": "must",
    "String should": "must",
    "Field required": "is missing",
    "Missing required argument": "is missing",
    "a valid integer": "an int",
    "a valid number": "a number",
}


class ConfigurationError(ValueError):
    """A value, key or file given by the user cannot be used.

    The message names the value and the key (or argument) that fixes it. The command line prints it without a
    traceback and exits with code 2; nothing has been changed when it is raised.
    """


@dataclass_transform(frozen_default=True, field_specifiers=(field, Field))
def validated(key: str, *, frozen: bool = True, kw_only: bool = False) -> Callable[[C], C]:
    """Make a dataclass of a class whose values are checked against its annotations when an object is made.

    Write constraints as annotations: ``Annotated[int, Field(ge=1)]``, ``Literal["min", "max"]``.

    Args:
        key: configuration key that the fields lie under; the error advises to set ``key.FIELD``.
        frozen: whether fields stay as they are given.
        kw_only: whether the fields of this class (not of its subclasses) are given by name alone.

    Raises:
        ConfigurationError: from the class's constructor, listing every value that cannot be used.
    """

    def decorate(cls: C) -> C:
        made: Any = dataclass(frozen=frozen, kw_only=kw_only, config=STRICT)(cls)
        made.__init__ = _explained(made.__init__, key, [*signature(made).parameters])
        return made  # type: ignore[no-any-return]

    return decorate


def validated_call(key: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Check the arguments of a function against its annotations, as :func:`validated` checks fields.

    Raises:
        ConfigurationError: from the function, listing every argument that cannot be used.
    """

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        known = [*signature(function).parameters]
        return _explained(validate_call(config=STRICT)(function), key, known)

    return decorate


def read_as(kind: type[T], data: Any, where: str) -> T:
    """An object of ``kind`` made of plain data (of JSON or YAML), every value checked.

    Args:
        kind: a class made by :func:`validated`, or any type that pydantic knows.
        data: mappings, lists, texts and numbers.
        where: what to fix: a file, or a configuration key.

    Raises:
        ConfigurationError: listing every value that cannot be used.
    """
    known = [f.name for part in (kind, *get_args(kind)) if is_dataclass(part) for f in fields(part)]
    try:  # as JSON, where a mapping may stand for a dataclass and a list for a tuple, but no text for a number
        return TypeAdapter(kind).validate_json(to_json(data, inf_nan_mode="constants"))
    except ValidationError as error:
        raise ConfigurationError(_listed(_faults(error, known), f"fix {where}")) from None


def _explained(call: Callable[P, T], key: str, known: Sequence[str]) -> Callable[P, T]:
    @wraps(call)
    def explained(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return call(*args, **kwargs)
        except ValidationError as error:
            faults = _faults(error, known)
            raise ConfigurationError(_listed(faults, ", ".join(f"set {key}.{name}" for name in faults))) from None

    return explained


def _faults(error: ValidationError, known: Sequence[str]) -> dict[str, str]:
    """{name of a field: what is wrong with it}."""
    faults = {}
    for fault in error.errors(include_url=False):
        first, *rest = fault["loc"] or ("",)
        name = ".".join(map(str, [known[first] if isinstance(first, int) and first < len(known) else first, *rest]))
        if fault["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
            near = get_close_matches(name.rpartition(".")[2], known, n=3) or sorted(known)
            faults[name] = f"{name!r} is unknown; nearest: {', '.join(near)}"
            continue
        said = fault["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
        for theirs, ours in _WORDS.items():
            said = said.replace(theirs, ours)
        got = "" if fault["type"].startswith(("missing", "value_error")) else f", got {fault['input']!r:.200}"
        faults[name] = f"{name} {said}{got}".strip()
    return faults


def _listed(faults: dict[str, str], advice: str) -> str:
    if len(faults) == 1:
        return f"{next(iter(faults.values()))}; {advice}"
    return "these values cannot be used:\n  " + "\n  ".join(faults.values()) + f"\n{advice}"
