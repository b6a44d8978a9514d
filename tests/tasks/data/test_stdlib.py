import ast
import base64
import bz2
import inspect
import shutil
import textwrap
from importlib import import_module

import pytest

from dynrank.errors import ConfigurationError
from dynrank.tasks.data.stdlib import parsed, stdlib_functions

MODULES = ["base64", "csv", "fractions", "gzip", "heapq", "json", "pprint", "queue", "random", "shutil", "textwrap"]


@pytest.fixture(scope="module")
def splits():
    return stdlib_functions(MODULES, seed=0)


TEXTS = {
    name: inspect.getsource(import_module(name))
    for name in [*MODULES, "json.decoder", "json.encoder", "json.scanner", "json.tool"]
}


def modules_with(function):
    """Which of MODULES hold the function's first line, straight from their files."""
    line = function[0].split("\n")[0]
    return {name.split(".")[0] for name, text in TEXTS.items() if line in text}


def everything(splits):
    return {function for part in splits.values() for function in part}


@pytest.mark.parametrize("function", [textwrap.dedent, base64.b64decode, shutil.copytree, textwrap.TextWrapper.wrap])
def test_prompt_and_body_are_the_source_of_the_function(splits, function):
    source = textwrap.dedent(inspect.getsource(function)).rstrip()
    ((prompt, body),) = [f for f in everything(splits) if "".join(f) == source]
    assert ast.get_docstring(ast.parse(prompt).body[0]) == inspect.getdoc(function)
    assert prompt.endswith(('"""', "'''"))
    assert body.startswith("\n    ")


def test_every_function_is_python_with_a_docstring_alone_in_its_prompt(splits):
    for prompt, body in everything(splits):
        (node,) = ast.parse(prompt).body
        assert len(node.body) == 1
        assert ast.get_docstring(node)
        assert len(ast.parse(prompt + body).body[0].body) > 1


def test_no_module_is_in_two_splits(splits):
    names = []
    for part in splits.values():
        # a first line such as `def __init__(self):` stands in many modules; those that stand in one say which it is
        found = [modules_with(function) for function in part]
        names.append(set.union(*(f for f in found if len(f) == 1)))
    assert all(names)
    assert sum(map(len, names)) == len(set.union(*names))


def test_seed_changes_the_split_but_not_the_functions(splits):
    other = stdlib_functions(MODULES, seed=1)
    assert everything(other) == everything(splits)
    assert set(other["test"]) != set(splits["test"])


def test_function_in_two_modules_is_left_out():
    # lzma has the same method.
    source = textwrap.dedent(inspect.getsource(bz2.BZ2File.tell)).rstrip()
    counts = []
    for names in (["bz2"], ["lzma"], ["bz2", "lzma"]):
        found = everything(stdlib_functions([*MODULES, *names], seed=0))
        counts.append(sum("".join(function) == source for function in found))
    assert counts == [1, 1, 0]


def test_unknown_module_is_refused_with_the_nearest():
    with pytest.raises(ConfigurationError, match=r"data\.modules.*txtwrap.*textwrap"):
        stdlib_functions(["txtwrap"], seed=0)


def test_empty_split_is_refused():
    with pytest.raises(ConfigurationError, match=r"no functions are left.*data\.modules"):
        stdlib_functions(["textwrap"], seed=0)


@pytest.mark.parametrize(
    ("source", "expected"),
    [("def f():\n    return 1", True), ("def f():\n    return (", False), ("x = '\\d'", True), ("x\0", False)],
)
def test_parses(source, expected):
    assert (parsed(source) is not None) is expected
