"""Functions of Python's standard library as signature, docstring and body; no module is in two splits."""

import ast
import sys
import sysconfig
import tokenize
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path

from dynrank.app.tasks.data.splits import Rows, place
from dynrank.errors import ConfigurationError, checked_call

# Folders of tests, and the folder of ensurepip's wheels.
_LEFT_OUT = {"test", "tests", "idle_test", "_bundled"}


@checked_call
def stdlib_functions(modules: Sequence[str] | None, seed: int) -> Rows:
    """Functions without their indentation as rows of prompt and answer, by split.

    The prompt is the signature and the docstring, and the answer is the rest of the source, from the line break on. All
    of a top-level module or package is in one split, which depends only on (``seed``, its name): about 80% of them are
    for training, and 10% each for the other two. A function that is word for word in two of them is left out, and so
    are tests. Versions of Python have different functions.

    Args:
        modules: names of top-level modules and packages to use; None for all.
        seed: seed of the splits.
    """
    files = _files()
    unknown = [name for name in modules or () if name not in files]
    if unknown:
        raise ConfigurationError(
            f"data.modules must name modules of the standard library that are written in Python, got {unknown}; "
            f"nearest: {get_close_matches(unknown[0], files, n=3)}"
        )
    modules_of: dict[tuple[str, str], set[str]] = defaultdict(set)
    for name in sorted(set(modules)) if modules is not None else files:
        for file in files[name]:
            for function in _functions(file):
                modules_of[function].add(name)
    rows: Rows = {"train": [], "val": [], "test": []}
    for (prompt, answer), names in modules_of.items():
        if len(names) == 1:
            rows[place(min(names), seed, 0.8, 0.9)].append({"prompt": prompt, "answer": answer})
    empty = [split for split, functions in rows.items() if not functions]
    if empty:
        raise ConfigurationError(
            f"no functions are left for {empty}, because all of a module is in one split; set data.modules or data.seed"
        )
    return rows


def _files() -> dict[str, list[Path]]:
    """The source files of each top-level module, both sorted."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files: dict[str, list[Path]] = {}
    for path in sorted(root.iterdir()):
        if path.stem in sys.stdlib_module_names and (path.suffix == ".py" or path.is_dir()):
            found = [path] if path.is_file() else sorted(path.rglob("*.py"))
            files[path.stem] = [file for file in found if not _LEFT_OUT & set(file.relative_to(root).parts)]
    return {name: found for name, found in files.items() if found}


def _functions(file: Path) -> Iterator[tuple[str, str]]:
    try:
        with tokenize.open(file) as text:
            source = text.read()
    # The file's encoding may be wrong.
    except (SyntaxError, UnicodeDecodeError):
        return
    tree = _parsed(source)
    # lib2to3 and others contain examples of Python 2.
    if tree is None:
        return
    # ast counts lines in this way; splitlines also ends lines at form feeds.
    lines = source.split("\n")
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and len(node.body) > 1 and ast.get_docstring(node):
            function = _function(node, lines)
            if function is not None and _parsed("".join(function)) is not None:
                yield function


def _parsed(source: str) -> ast.Module | None:
    """The syntax tree of ``source``; None if it is not valid Python."""
    with warnings.catch_warnings():
        # Python warns about some escapes and comparisons, but they are valid Python.
        warnings.simplefilter("ignore")
        try:
            return ast.parse(source)
        # A source with null bytes is a ValueError.
        except (SyntaxError, ValueError):
            return None


def _function(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: Sequence[str]) -> tuple[str, str] | None:
    docstring = node.body[0]
    assert docstring.end_lineno is not None
    # ast counts columns in bytes.
    last = lines[docstring.end_lineno - 1].encode()
    indent = lines[node.lineno - 1][: node.col_offset]
    # In these functions, the docstring shares a line with other code.
    if last[docstring.end_col_offset :].strip():
        return None
    signature = [*lines[node.lineno - 1 : docstring.end_lineno - 1], last[: docstring.end_col_offset].decode()]
    body = lines[docstring.end_lineno : node.end_lineno]
    prompt, answer = ("\n".join(line.removeprefix(indent) for line in part) for part in (signature, body))
    return prompt, "\n" + answer.rstrip()
