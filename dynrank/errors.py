"""The one error for wrong user input, pydantic's errors translated into it, and types that many settings share."""

import collections.abc
import dataclasses
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import field, fields, is_dataclass
from difflib import get_close_matches
from functools import partial, reduce, wraps
from inspect import Parameter, Signature, signature
from operator import or_
from reprlib import Repr
from types import UnionType
from typing import (
    Annotated,
    Any,
    Literal,
    ParamSpec,
    TypeVar,
    Union,
    dataclass_transform,
    get_args,
    get_origin,
    overload,
)

from pydantic import ByteSize, ConfigDict, Field, TypeAdapter, ValidationError, validate_call
from pydantic.dataclasses import dataclass
from pydantic.fields import FieldInfo
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


class ConfigurationError(ValueError):
    """A value or file from the user cannot be used; nothing has been changed when it is raised.

    The message names the argument of the call, its value, and how to fix it. The command line adds its own key or
    option, prints the error without a traceback, and exits with code 2.

    Attributes:
        arguments: the names of the arguments at fault, with a dot before a field: "how.max_regression".

    >>> from dynrank.schedules import early_budget
    >>> try:
    ...     early_budget(0)
    ... except ConfigurationError as error:
    ...     print(error)
    final_rank must be greater than or equal to 1, got 0
    """

    def __init__(self, message: str, *arguments: str) -> None:
        super().__init__(message)
        self.arguments = arguments


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
    return DivergedError(f"{name!r}: {error}; nothing has been changed. Training has diverged: lower lr", "lr")


@overload
def checked(cls: C, /) -> C: ...


@overload
def checked(*, frozen: bool = True, kw_only: bool = False) -> Callable[[C], C]: ...


@dataclass_transform(frozen_default=True, field_specifiers=(field, Field))
def checked(cls: Any = None, /, *, frozen: bool = True, kw_only: bool = False) -> Any:
    """Make a class a dataclass whose constructor checks each value against its annotation.

    Write constraints as annotations: ``Annotated[int, Field(ge=1)]``, ``Literal["min", "max"]``. The repr leaves out
    values that are the defaults.

    Args:
        cls: the class.
        frozen: whether fields are read-only.
        kw_only: whether the fields of this class (not of its subclasses) are keyword-only.
    """
    if cls is None:
        return partial(checked, frozen=frozen, kw_only=kw_only)
    made: Any = dataclass(frozen=frozen, kw_only=kw_only, repr=False, config=STRICT)(cls)
    shape = _plain_signature(made)
    made.__init__ = _explained(made.__init__, [*shape.parameters])
    itself = Parameter("self", Parameter.POSITIONAL_OR_KEYWORD)
    made.__init__.__signature__ = shape.replace(parameters=[itself, *shape.parameters.values()])
    made.__signature__ = shape
    if "__repr__" not in vars(cls):
        made.__repr__ = described
    return made


def checked_call(function: Callable[P, T]) -> Callable[P, T]:
    """Check the arguments of a function against its annotations, as :func:`checked` checks fields."""
    shape = _plain_signature(function)
    made: Any = _explained(validate_call(config=STRICT)(function), [*shape.parameters])
    made.__signature__ = shape
    return made  # type: ignore[no-any-return]


def described(value: object) -> str:
    """``repr(value)``; of a dataclass, a call with those of its arguments that differ from the defaults.

    >>> from dynrank.targets import Budget
    >>> described(Budget(final_rank=4))
    'Budget(final_rank=4)'
    """
    if not is_dataclass(value) or isinstance(value, type):
        return repr(value)
    texts = {part.name: described(getattr(value, part.name)) for part in fields(value) if part.init and part.repr}
    # Texts are compared, because the result of == may be a tensor.
    defaults = {part.name: described(_default(part)) for part in fields(value)}
    given = (f"{name}={text}" for name, text in texts.items() if text != defaults[name])
    return f"{type(value).__name__}({', '.join(given)})"


def _default(part: dataclasses.Field[Any]) -> Any:
    if isinstance(part.default, FieldInfo):
        return part.default.get_default(call_default_factory=True)
    return part.default if part.default_factory is dataclasses.MISSING else part.default_factory()


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

    ``kind`` is a class made by :func:`checked`, or any type that pydantic knows. An error names ``where``, the file
    or argument.
    """
    known = [f.name for part in (kind, *get_args(kind)) if is_dataclass(part) for f in fields(part)]
    # In JSON mode a mapping can become a dataclass and a list a tuple, but a text never becomes a number.
    try:
        return TypeAdapter(kind).validate_json(to_json(data, inf_nan_mode="constants"))
    except ValidationError as error:
        said = _listed(_faults(error, known, whole=True))
        raise ConfigurationError(said + ("\n" if "\n" in said else "; ") + f"fix {where}") from None
    except PydanticSerializationError as error:
        raise ConfigurationError(f"{where} must hold plain data, got a value that JSON cannot hold: {error}") from None


def shown(value: Any) -> str:
    """``repr(value)`` for a message, shortened; a large value is not formatted as a whole first."""
    short = Repr()
    short.maxlevel = 2
    short.maxstring = 200
    short.maxother = 200
    return short.repr(value)


def _explained(call: Callable[P, T], known: Sequence[str]) -> Callable[P, T]:
    @wraps(call)
    def explained(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return call(*args, **kwargs)
        except ValidationError as error:
            faults = _faults(error, known, whole=False)
            # __post_init__ raises errors of our own.
            ours = [fault["ctx"]["error"] for fault in error.errors() if fault["type"] == "value_error"]
            named = [name for each in ours for name in getattr(each, "arguments", ())]
            raise ConfigurationError(_listed(faults), *filter(None, faults), *named) from None

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


def _listed(faults: dict[str, str]) -> str:
    if len(faults) == 1:
        return next(iter(faults.values()))
    return "\n  ".join(["these values cannot be used:", *faults.values()])
