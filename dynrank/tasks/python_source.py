"""Whether a text is Python."""

import ast
import warnings


def parsed(source: str) -> ast.Module | None:
    """The syntax tree of ``source``; None if it is not valid Python."""
    with warnings.catch_warnings():
        # Python warns about some escapes and comparisons, but they are valid Python.
        warnings.simplefilter("ignore")
        try:
            return ast.parse(source)
        # The last three mean that the source has null bytes, or is nested too deeply for the parser.
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return None
