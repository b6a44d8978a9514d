"""The examples in docstrings do what they say."""

import doctest
from importlib import import_module
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
