"""Whether a text is Python."""

from __future__ import annotations

import ast
import warnings


def parsed(source: str) -> ast.Module | None:
    """The syntax tree of ``source``; None where it is no Python."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of doubtful escapes and comparisons, which are Python nevertheless
        try:
            return ast.parse(source)
        except (SyntaxError, ValueError, RecursionError, MemoryError):  # null bytes; too deep for the parser
            return None
