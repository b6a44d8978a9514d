"""A file imports only from lower layers, or from its own folder."""

import ast
from pathlib import Path

import dynrank

ROOT = Path(dynrank.__file__).parent
LAYERS = {
    -1: {"errors"},
    0: {"linalg", "allocation", "rank_map", "kernels"},
    1: {"triggers", "targets"},
    2: {"schedules"},
    3: {
        "layers",
        "optim",
        "rewarmup",
        "adapter_config",
        "console",
        "output_folder",
        "tensor_file",
        "processes",
        "run_folder",
        "model_config",
    },
    4: {"statistics", "adapter_file", "averaging", "agreement", "sharding", "checkpoint_file", "base_weights"},
    5: {"resizing", "adapter", "adapter_fit"},
    6: {"adapter_loading", "planning", "squeeze", "change_table", "rank_change"},
    7: {"driver", "tasks", "config", "plots", "exits", "step_memory"},
    8: {"callbacks", "merging", "inspection", "preflight", "trusted", "optimizer_state", "sweep_report"},
    9: {"report", "html_report", "memory_plan", "sweep_table"},
    10: {"job"},
    11: {"rank_table", "plan_table", "sweep_run"},
    12: {"train", "cli"},
}
LAYER_OF = {name: layer for layer, names in LAYERS.items() for name in names}


def sources():
    for path in sorted([*ROOT.rglob("*.py"), *(ROOT / "kernels").glob("*.py")]):  # rglob does not follow links
        relative = path.relative_to(ROOT)
        if relative.parts[0] not in ("__init__.py", "conf"):
            yield relative, ast.parse(path.read_text(encoding="utf-8"))


def imported_units(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "dynrank":
            names.add(node.module)
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names if alias.name.split(".")[0] == "dynrank"}
    return {name.split(".")[1] for name in names if "." in name}


def test_every_file_has_a_layer():
    units = {relative.parts[0].removesuffix(".py") for relative, _ in sources()}
    assert units == set(LAYER_OF)


def test_imports_point_downward():
    wrong = []
    for relative, tree in sources():
        unit = relative.parts[0].removesuffix(".py")
        wrong += [
            f"{relative} imports dynrank.{other}"
            for other in imported_units(tree)
            if other != unit and LAYER_OF[other] >= LAYER_OF[unit]
        ]
    assert not wrong


def test_layers_0_to_2_know_no_framework():
    foreign = ("lightning", "hydra", "transformers", "torch.nn")
    wrong = []
    for relative, tree in sources():
        if LAYER_OF[relative.parts[0].removesuffix(".py")] <= 2:
            for node in ast.walk(tree):
                if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith(foreign):
                    wrong.append(f"{relative} imports {node.module}")
    assert not wrong
