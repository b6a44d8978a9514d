"""Whether a text is Python."""

from __future__ import annotations

import ast
import warnings


def parsed(source: str) -> ast.Module | None:
    """The syntax tree of ``source``; None where it is no Python."""
    with warnings.catch_warnings():
        # Python warns of doubtful escapes and comparisons, which are valid Python.
        warnings.simplefilter("ignore")
        try:
            return ast.parse(source)
        # The source has null bytes, or is too deep for the parser.
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return None
