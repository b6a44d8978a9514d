"""The one error for wrong user input, pydantic's errors translated into it, and types that many settings share."""

import collections.abc
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import field, fields, is_dataclass
from difflib import get_close_matches
from functools import reduce, wraps
from inspect import Parameter, Signature, signature
from operator import or_
from reprlib import Repr
from types import UnionType
from typing import Annotated, Any, Literal, ParamSpec, TypeVar, Union, dataclass_transform, get_args, get_origin

from pydantic import ByteSize, ConfigDict, Field, TypeAdapter, ValidationError, validate_call
from pydantic.dataclasses import dataclass
from pydantic_core import PydanticSerializationError, to_json

C = TypeVar("C", bound=type)
T = TypeVar("T")
P = ParamSpec("P")

# Strict: a bool is not taken for an int, nor a text for a number, because YAML and Python tell them apart.
STRICT = ConfigDict(strict=True, extra="forbid", arbitrary_types_allowed=True)

Count = Annotated[int, Field(ge=1)]
Steps = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(gt=0, le=1)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Name = Annotated[str, Field(min_length=1)]

# {an argument of PEFT's configs: what it is called here}, for whoever types the former.
PEFT_NAMES = {
    "r": "rank",
    "init_r": "rank",
    "target_r": "final_rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "use_rslora": "rslora",
    "rank_pattern": "rank_map",
    "alpha_pattern": "rank_map",
}

# How pydantic's messages begin.
_PYDANTIC = re.compile(r"^\w+ should")

_configured: ContextVar[bool] = ContextVar("configured", default=False)
# A configuration key in a message, and the value that the message advises; not inside a path, quotes or a value, and
# not a call.
_KEY = re.compile(
    r"(?<![\w./='\"-])(?:schedule\.(?:how|target|trigger)|data|lora|model|optimizer|rank_map|schedule|task|trainer)\."
    r"(?P<argument>[a-z_]+)\b(?!\()(?:=(?P<word>null|true|false)\b)?"
)
# An option of a command that is an argument of the function of that name.
_OPTION = re.compile(r"(?<![\w./='\"-])--(?=(?:out|rank|energy|budget|model|to|multiple)\b)")
_IN_PYTHON = {"null": "None", "true": "True", "false": "False"}


class ConfigurationError(ValueError):
    """A value, key or file from the user cannot be used.

    The message names the value and how to fix it: on the command line by its key or option, else by the
    argument of the call.
    Nothing has been changed when it is raised. The command line prints it without a traceback and exits with code 2.

    >>> from dynrank.schedules import early_budget
    >>> try:
    ...     early_budget(0)
    ... except ConfigurationError as error:
    ...     print(error)
    final_rank must be greater than or equal to 1, got 0
    """

    def __init__(self, message: str, *arguments: str) -> None:
        super().__init__(for_its_reader(message))
        # The names of the arguments at fault; the application adds their keys.
        self.arguments = arguments


def for_its_reader(message: str) -> str:
    """A message that names keys or options, with these inside :func:`configured`, else with arguments instead."""
    return message if _configured.get() else _OPTION.sub("", _KEY.sub(_as_argument, message))


def _as_argument(key: re.Match[str]) -> str:
    return key["argument"] + (f"={_IN_PYTHON[key['word']]}" if key["word"] else "")


@contextmanager
def configured() -> Iterator[None]:
    """Make errors name configuration keys inside the block, or inside the function that this decorates."""
    token = _configured.set(True)
    try:
        yield
    finally:
        _configured.reset(token)


@contextmanager
def train_packages(user: str) -> Iterator[None]:
    """Say how to install a package of ``dynrank[train]`` that the block lacks; ``user`` is what needs it."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        raise ConfigurationError(f"{user} needs the package {package}: pip install 'dynrank[train]'") from error


class DivergedError(ConfigurationError):
    """A trained value is NaN, inf or too large to continue; the command line exits with code 1."""


def diverged(name: str, error: ValueError) -> DivergedError:
    return DivergedError(f"{name!r}: {error}; nothing has been changed. Training has diverged: lower optimizer.lr")


@dataclass_transform(frozen_default=True, field_specifiers=(field, Field))
def validated(key: str = "", *, frozen: bool = True, kw_only: bool = False) -> Callable[[C], C]:
    """Make a class a dataclass whose constructor checks each value against its annotation.

    Write constraints as annotations: ``Annotated[int, Field(ge=1)]``, ``Literal["min", "max"]``.

    Args:
        key: configuration key of the object; the error advises to set ``key.FIELD``. "": no advice.
        frozen: whether fields are read-only.
        kw_only: whether the fields of this class (not of its subclasses) are keyword-only.
    """

    def decorate(cls: C) -> C:
        made: Any = dataclass(frozen=frozen, kw_only=kw_only, config=STRICT)(cls)
        shape = _plain_signature(made)
        made.__init__ = _explained(made.__init__, key, [*shape.parameters])
        itself = Parameter("self", Parameter.POSITIONAL_OR_KEYWORD)
        made.__init__.__signature__ = shape.replace(parameters=[itself, *shape.parameters.values()])
        made.__signature__ = shape
        return made  # type: ignore[no-any-return]

    return decorate


def validated_call(key: str = "") -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Check the arguments of a function against its annotations, as :func:`validated` checks fields."""

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        shape = _plain_signature(function)
        checked: Any = _explained(validate_call(config=STRICT)(function), key, [*shape.parameters])
        checked.__signature__ = shape
        return checked  # type: ignore[no-any-return]

    return decorate


def _plain_signature(call: Callable[..., Any]) -> Signature:
    """The signature as people read it, with types and without constraints: ``final_rank: int | None = None``."""
    shape = signature(call, eval_str=True)
    plain = [parameter.replace(annotation=_plain(parameter.annotation)) for parameter in shape.parameters.values()]
    return shape.replace(parameters=plain)


def _plain(annotation: Any) -> Any:
    origin = get_origin(annotation)
    inner = get_args(annotation)
    if annotation is ByteSize:
        return int | str
    if origin is Annotated:
        return _plain(inner[0])
    if origin in (Union, UnionType):
        return reduce(or_, map(_plain, inner))
    if origin in (None, Literal, collections.abc.Callable):
        return annotation
    return origin[tuple(map(_plain, inner))]


def read_as(kind: type[T], data: Any, where: str) -> T:
    """An object of ``kind`` from plain data (of JSON or YAML), with every value checked.

    ``kind`` is a class made by :func:`validated`, or any type that pydantic knows. An error names ``where``, the file
    or configuration key.
    """
    known = [f.name for part in (kind, *get_args(kind)) if is_dataclass(part) for f in fields(part)]
    # In JSON mode a mapping can become a dataclass and a list a tuple, but a text never becomes a number.
    try:
        return TypeAdapter(kind).validate_json(to_json(data, inf_nan_mode="constants"))
    except ValidationError as error:
        raise ConfigurationError(_listed(_faults(error, known, whole=True), f"fix {where}")) from None
    except PydanticSerializationError as error:
        raise ConfigurationError(f"{where} must hold plain data, got a value that JSON cannot hold: {error}") from None


def shown(value: Any) -> str:
    """``repr(value)`` for a message, shortened; a large value is not formatted as a whole first."""
    short = Repr()
    short.maxlevel = 2
    short.maxstring = 200
    short.maxother = 200
    return short.repr(value)


def _explained(call: Callable[P, T], key: str, known: Sequence[str]) -> Callable[P, T]:
    @wraps(call)
    def explained(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return call(*args, **kwargs)
        except ValidationError as error:
            faults = _faults(error, known, whole=False)
            # In Python the fault names the argument already, and the key would repeat it.
            keys = [f"{key}.{name}" for name in faults if name] if key and _configured.get() else []
            raise ConfigurationError(_listed(faults, f"set {', '.join(keys)}" if keys else "")) from None

    return explained


def _faults(error: ValidationError, known: Sequence[str], *, whole: bool) -> dict[str, str]:
    """{path of a value: the message about it}; ``known`` are the names of the fields or arguments, in their order.

    With ``whole`` a text in a location is a key of a mapping; below an argument it names a type of a union.
    """
    said = defaultdict[str, list[str]](list)
    got = {}
    for fault in error.errors(include_url=False):
        first, *rest = fault["loc"] or ("",)
        path = str(known[first] if isinstance(first, int) and first < len(known) else first)
        for part in rest:
            path += f"[{part}]" if isinstance(part, int) else f".{part}" if whole else ""
        kind = fault["type"]
        if kind in ("unexpected_keyword_argument", "extra_forbidden"):
            name = path.rpartition(".")[2]
            near = get_close_matches(name, known, n=3) or sorted({*known} - {"self"})
            here = PEFT_NAMES.get(name)
            said[path].append(f"is {here} here" if here in known else f"is unknown; nearest: {', '.join(near)}")
        elif kind.startswith("missing"):
            said[path].append("is missing")
        elif kind == "value_error":
            # A sentence of our own, from a validator.
            said[path].append(str(fault["ctx"]["error"]))
        else:
            said[path].append(_PYDANTIC.sub("must", fault["msg"]))
            got[path] = f", got {shown(fault['input'])}"
    # A union has one fault for each of its types.
    return {path: f"{path} {' or '.join(faults)}{got.get(path, '')}".strip() for path, faults in said.items()}


def _listed(faults: dict[str, str], advice: str) -> str:
    if len(faults) == 1 or not advice:
        return "; ".join(filter(None, [*faults.values(), advice]))
    return "\n  ".join(["these values cannot be used:", *faults.values()]) + f"\n{advice}"
