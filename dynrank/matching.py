"""Names of modules, matched by expressions that users and adapters bring: in bounded time, or not at all."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import regex

from dynrank.errors import ConfigurationError

__all__ = ["EXPRESSION_ERRORS", "Matching", "compiled", "whole_parts"]

T = TypeVar("T")

EXPRESSION_ERRORS = (re.error, regex.error, RecursionError, OverflowError)  # what compiling raises
_PATIENCE, _EACH = 5.0, 1e-4  # seconds for all matches that are made, and in addition for each of them
_REPEATS = 100_000


def whole_parts(key: str) -> str:
    """The expression that PEFT matches against a module's name for a key of rank_pattern or alpha_pattern."""
    return rf"(.*\.)?({key})$"


def compiled(expression: str) -> Any:
    """A regular expression whose matches can be given a time limit, which those of ``re`` cannot.

    Raises:
        regex.error: or another of ``EXPRESSION_ERRORS``, if it is none, or repeats too often: repeats are written out.
    """
    if math.prod(max(1, int(count[:9])) for count in re.findall(r"[{,](\d+)(?=[,}])", expression)) > _REPEATS:
        raise OverflowError(f"its counted repeats may multiply to {_REPEATS:,} at most")
    re.compile(expression)  # PEFT's engine refuses more of them
    return regex.compile(expression)


class Matching:
    """Matches names by expressions that stand in ``source``, with a limit to the time that all of them take."""

    def __init__(self, source: str) -> None:
        self._source, self._until = source, time.thread_time() + _PATIENCE

    def names(self, expression: str, names: Iterable[str]) -> list[str]:
        """Those of ``names`` that ``expression`` matches from their beginning.

        Raises:
            ConfigurationError: if it takes too long.
            regex.error: as :func:`compiled`.
        """
        pattern, found = compiled(expression), []
        try:
            for name in names:
                self._until += _EACH
                if pattern.match(name, timeout=max(self._until - time.thread_time(), _EACH)):
                    found.append(name)
        except TimeoutError:
            raise ConfigurationError(
                f"{self._source} must hold simple expressions, they take over {_PATIENCE:g} s to match; name the "
                "layers in full"
            ) from None
        return found

    def first(self, pattern: Mapping[str, T], names: Iterable[str]) -> dict[str, T]:
        r"""{name: what the first key that matches it stands for}, by PEFT's rule; a name that none matches is left out.

        A key is a regular expression for whole trailing parts of a module name. Errors as in :meth:`names`.

        >>> Matching("ranks").first({"q_proj": 1, r"layers\.[01]\..*": 2}, ["layers.1.q_proj", "layers.0.eq_proj"])
        {'layers.1.q_proj': 1, 'layers.0.eq_proj': 2}
        """
        left, found = dict.fromkeys(names), {}
        for key, value in pattern.items():
            for name in self.names(whole_parts(key), left):
                found[name] = value
                del left[name]
        return found
