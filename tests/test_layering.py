"""Packages import only from lower layers; few modules are in no package."""

import ast
from pathlib import Path

import pytest

import dynrank

ROOT = Path(dynrank.__file__).parent
# A module imports from the layers below its own and from its own package.
LAYERS = (
    ("errors", "private"),
    ("linalg", "kernels", "digest", "muon"),
    ("rank_map", "triggers"),
    ("targets",),
    ("schedules",),
    ("layers",),
    ("models", "distributed"),
    ("change",),
    ("output",),
    ("driver",),
    ("adapters",),
    ("plot",),
    ("callbacks", "tasks"),
    ("integrations",),
    ("runs",),
    ("planner",),
    ("commands",),
    ("train", "__init__"),
)
LAYER_OF = {package: layer for layer, packages in enumerate(LAYERS) for package in packages}


def modules():
    """(path below dynrank/, syntax tree) of every module; kernels/ is a link, which rglob does not follow."""
    for path in sorted([*ROOT.rglob("*.py"), *(ROOT / "kernels").glob("*.py")]):
        relative = path.relative_to(ROOT)
        if relative.parts[0] != "conf":
            yield relative, ast.parse(path.read_text(encoding="utf-8"))


MODULES = dict(modules())


def package_of(relative: Path) -> str:
    return relative.parts[0].removesuffix(".py")


def name_of(relative: Path) -> str:
    parts = ("dynrank", *relative.with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 2 else parts)


NAMES = {name_of(relative) for relative in MODULES}


def imported(tree: ast.AST) -> set[str]:
    """Full names of the modules of dynrank that a module imports, or imports from."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            below = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (below & NAMES) or {node.module}
    return {name for name in found if name.startswith("dynrank.")}


def test_at_most_eight_modules_are_in_no_package():
    assert len([relative for relative in MODULES if len(relative.parts) == 1]) <= 8
    assert {package_of(relative) for relative in MODULES} == set(LAYER_OF)


@pytest.mark.parametrize("relative", MODULES, ids=str)
def test_imports_go_downward(relative):
    own = package_of(relative)
    others = {name.split(".")[1] for name in imported(MODULES[relative])} - {own}
    assert not [other for other in others if LAYER_OF[other] >= LAYER_OF[own]]


def test_no_module_imports_itself_through_others():
    above = {name_of(relative): imported(tree) for relative, tree in MODULES.items()}
    while above:
        free = [name for name, needs in above.items() if not needs & above.keys() - {name}]
        assert free, f"a circle among {sorted(above)}"
        for name in free:
            del above[name]


def test_mathematics_and_schedules_know_no_framework():
    foreign = ("lightning", "hydra", "transformers", "torch.nn")
    for relative, tree in MODULES.items():
        if LAYER_OF[package_of(relative)] <= LAYER_OF["schedules"]:
            lines = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
            assert not [line for line in lines if line.startswith(foreign)], relative
