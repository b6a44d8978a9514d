"""The lock fits pyproject.toml, whose upper bounds end at the last release that was tried."""

import csv
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
WANTED = [
    requirement
    for group in (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values())
    for requirement in map(Requirement, group)
    if requirement.name != PROJECT["name"]
]
LINES = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
LOCK = [Requirement(line) for line in LINES if not line.startswith("#")]


def versions(name):
    """Those of a package in constraints.txt."""
    pins = [str(pin.specifier).removeprefix("==") for pin in LOCK if pin.name == name.lower().replace("_", "-")]
    return [Version(pin) for pin in pins]


@pytest.mark.parametrize("requirement", WANTED, ids=str)
def test_the_lock_has_what_the_project_wants(requirement):
    locked = versions(requirement.name)
    assert locked, "run scripts/lock"
    assert all(version in requirement.specifier for version in locked), "run scripts/lock"


@pytest.mark.parametrize("name", ["torch", "lightning", "transformers", "peft"])
def test_the_upper_bound_is_the_release_after_the_last_that_was_tried(name):
    with (ROOT / "scripts/results/newest.csv").open(newline="", encoding="utf-8") as file:
        noted = [row[name] for row in csv.DictReader(file)]
    # This very run is one more trial.
    newest = [Version(Version(version).public) for version in [*noted, metadata.version(name)]]
    tried = max(newest + versions(name))
    (wanted,) = (requirement for requirement in WANTED if requirement.name == name)
    assert tried in wanted.specifier
    assert f"{tried.major}.{tried.minor + 1}" not in wanted.specifier
