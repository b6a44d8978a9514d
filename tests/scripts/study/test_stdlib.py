import ast
import base64
import bz2
import inspect
import shutil
import textwrap

import pytest
from study_data.stdlib import stdlib_functions

from dynrank.errors import ConfigurationError

MODULES = ["base64", "csv", "fractions", "gzip", "heapq", "json", "pprint", "queue", "random", "shutil", "textwrap"]


@pytest.fixture(scope="module")
def splits():
    return stdlib_functions(MODULES, seed=0)


def everything(splits):
    return {tuple(row.values()) for part in splits.values() for row in part}


@pytest.mark.parametrize("owner", [textwrap, textwrap.TextWrapper, base64, shutil], ids=lambda owner: owner.__name__)
def test_functions_are_their_source_and_those_of_a_module_in_one_split(owner, splits):
    known = {"".join(row.values()): (split, *row.values()) for split, part in splits.items() for row in part}
    places = []
    for _, function in inspect.getmembers(owner, inspect.isfunction):
        source = textwrap.dedent(inspect.getsource(function)).rstrip()
        if source in known:
            split, prompt, body = known[source]
            assert ast.get_docstring(ast.parse(prompt).body[0]) == inspect.getdoc(function)
            assert prompt.endswith(('"""', "'''"))
            assert body.startswith("\n")
            places.append(split)
    assert len(places) >= 4
    assert len({*places}) == 1


def test_every_function_is_python_with_a_docstring_alone_in_its_prompt(splits):
    for prompt, body in everything(splits):
        (node,) = ast.parse(prompt).body
        assert len(node.body) == 1
        assert ast.get_docstring(node)
        assert len(ast.parse(prompt + body).body[0].body) > 1


def test_seed_changes_the_split_but_not_the_functions(splits):
    other = stdlib_functions(MODULES, seed=1)
    assert everything(other) == everything(splits)
    assert other["test"] != splits["test"]


def test_function_in_two_modules_is_left_out():
    # lzma has the same method.
    source = textwrap.dedent(inspect.getsource(bz2.BZ2File.tell)).rstrip()
    counts = []
    for names in (["bz2"], ["lzma"], ["bz2", "lzma"]):
        found = everything(stdlib_functions([*MODULES, *names], seed=0))
        counts.append(sum("".join(function) == source for function in found))
    assert counts == [1, 1, 0]


@pytest.mark.parametrize(
    ("module", "said"),
    [("txtwrap", r"data\.modules.*txtwrap.*textwrap"), ("textwrap", r"no functions are left.*data\.modules")],
)
def test_modules_without_functions_for_each_split_are_named(module, said):
    with pytest.raises(ConfigurationError, match=said):
        stdlib_functions([module], seed=0)
