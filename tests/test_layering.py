"""The library does not know the application; in both, folders import only from lower ones; few modules are in none."""

import ast
from pathlib import Path

import pytest

import dynrank

ROOT = Path(dynrank.__file__).parent
# A module imports from the floors below its own and from its own folder.
LIBRARY = (
    ("errors", "private"),
    ("linalg", "kernels", "digest", "patterns"),
    ("rank_map", "triggers"),
    ("targets",),
    ("schedules",),
    ("layers",),
    ("distributed",),
    ("change",),
    ("output",),
    ("importance",),
    ("driver",),
    ("adapters",),
    ("plot",),
    ("callbacks",),
    ("integrations",),
)
APPLICATION = (("console", "keys"), ("models",), ("tasks",), ("runs",), ("planner",), ("commands",), ("train",))
ENTRANCES = (("train", "__init__"),)
ORDER = (*LIBRARY, *(tuple(f"app.{name}" for name in floor) for floor in APPLICATION), *ENTRANCES)
FLOOR_OF = {place: floor for floor, places in enumerate(ORDER) for place in places}
IN_LIBRARY = len(LIBRARY)


def modules():
    """(path below dynrank/, syntax tree) of every module; kernels/ is a link, which rglob does not follow."""
    for path in sorted([*ROOT.rglob("*.py"), *(ROOT / "kernels").glob("*.py")]):
        relative = path.relative_to(ROOT)
        if relative.parts[0] != "conf" and relative != Path("app", "__init__.py"):
            yield relative, ast.parse(path.read_text(encoding="utf-8"))


MODULES = dict(modules())


def place_of(name: str) -> str:
    """The file or folder of a module by its dotted name below dynrank: of the application's with ``app`` before it."""
    parts = name.split(".")
    return ".".join(parts[:2] if parts[0] == "app" else parts[:1])


def name_of(relative: Path) -> str:
    """The dotted name of a module below dynrank."""
    parts = relative.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


NAMES = {name_of(relative) for relative in MODULES}


def imported(tree: ast.AST) -> set[str]:
    """Names below dynrank of the modules that a module imports, or imports from."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            below = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name for name in below if name.removeprefix("dynrank.") in NAMES} or {node.module}
    return {name.removeprefix("dynrank.") for name in found if name.startswith("dynrank.")}


def test_at_most_nine_modules_are_in_no_folder():
    assert len([relative for relative in MODULES if len(relative.parts) == 1]) <= 9
    assert {place_of(name_of(relative)) for relative in MODULES} == set(FLOOR_OF)


@pytest.mark.parametrize("relative", MODULES, ids=str)
def test_imports_go_downward(relative):
    own = place_of(name_of(relative))
    others = {place_of(name) for name in imported(MODULES[relative])} - {own}
    assert not [other for other in others if FLOOR_OF[other] >= FLOOR_OF[own]]


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
        if FLOOR_OF[place_of(name_of(relative))] <= FLOOR_OF["schedules"]:
            lines = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
            assert not [line for line in lines if line.startswith(foreign)], relative


def test_the_library_knows_neither_the_application_nor_its_packages():
    foreign = ("datasets", "filelock", "hydra", "jinja2", "pandas", "pyarrow", "torchmetrics", "tqdm", "typer")
    for relative, tree in MODULES.items():
        if FLOOR_OF[place_of(name_of(relative))] < IN_LIBRARY:
            nodes = [*ast.walk(tree)]
            names = {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
            names |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
            # Lightning itself depends on torchmetrics.
            own = {"torchmetrics"} if relative.is_relative_to("callbacks/lightning") else set()
            assert not [name for name in names if name.split(".")[0] in {*foreign} - own], relative
            assert not [name for name in names if name.startswith("dynrank.app")], relative
