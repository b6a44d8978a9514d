"""The closure among the arguments of an optimizer's step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Closure = Callable[[], Any]


def with_closure(
    args: tuple[Any, ...], kwargs: dict[str, Any], wrapped: Callable[[Closure], Closure]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """The arguments of a hook before a step with ``wrapped`` of their closure; None if they have no closure."""
    if callable(kwargs.get("closure")):
        return args, {**kwargs, "closure": wrapped(kwargs["closure"])}
    if len(args) > 1 and callable(args[1]):
        return (args[0], wrapped(args[1]), *args[2:]), kwargs
    return None
