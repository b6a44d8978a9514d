"""The examples in docstrings do what they say, and every public class and function has one."""

import doctest
from importlib import import_module
from inspect import getdoc, isroutine
from pathlib import Path

import pytest

import dynrank

ROOT = Path(dynrank.__file__).parent
SOURCES = [path.relative_to(ROOT) for path in ROOT.rglob("*.py") if ">>> " in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("source", sorted(SOURCES), ids=str)
def test_examples_do_what_they_say(source):
    module = import_module(".".join(("dynrank", *source.with_suffix("").parts)).removesuffix(".__init__"))
    failed, tried = doctest.testmod(module)
    assert tried
    assert not failed


@pytest.mark.parametrize("package", ["", ".schedules", ".triggers", ".targets", ".callbacks"])
def test_every_public_name_has_an_example(package):
    module = import_module(f"dynrank{package}")
    offered = {name: getattr(module, name) for name in module.__all__}
    texts = {name: getdoc(made) or "" for name, made in offered.items() if isroutine(made) or isinstance(made, type)}
    assert texts
    assert not [name for name, text in texts.items() if ">>> " not in text and "Example::" not in text]
