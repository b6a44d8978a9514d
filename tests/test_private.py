"""``dynrank/foreign.md`` names all that dynrank reads or replaces in other libraries beyond their public interface."""

import ast
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from foreign_writes import Writes, is_self
from lightning.fabric import Fabric
from torch import nn
from transformers import BertConfig, BertModel, MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

import dynrank
from dynrank import private

ROOT = Path(dynrank.__file__).parent
TREES = {
    path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
    for path in [*ROOT.rglob("*.py"), *(ROOT / "kernels").glob("*.py")]
    if path.relative_to(ROOT).parts[0] != "conf"
}
# The methods of a namedtuple, which have an underscore so that they clash with no field; Hydra's key of a class; a key
# that dynrank itself adds to a state dict.
PUBLIC = {"_asdict", "_replace", "_target_", "_frozen_base"}
# Attributes of errors, functions and tables that dynrank has made.
OF_MADE_HERE = {"__signature__", "args", "caption", "min_width"}
# Attributes of other libraries' objects that have the name of one of ours.
OF_BOTH = {"data", "lora_alpha", "param_groups", "problem_type", "r", "state", "use_rslora"}


def is_private(name):
    return len(name) > 1 and name.startswith("_") and not name.startswith("__") and name.isidentifier()


def own_texts():
    """Names that dynrank itself gives to functions, classes and variables."""
    nodes = [node for tree in TREES.values() for node in ast.walk(tree)]
    named = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    return named | {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}


def private_names(tree, fields, texts):
    """Names with an underscore that are not dynrank's own: imported, behind an object, or as a text for getattr."""
    nodes = [*ast.walk(tree)]
    # The parts of f"{name}_size" are no names.
    parts = {part for node in nodes if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in nodes:
        names = []
        if isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("dynrank"):
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Attribute) and node.attr not in fields:
            names = [node.attr]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in parts:
            names = {node.value} - fields - texts
        yield from (name for name in names if is_private(name) and name not in PUBLIC)


def fields_of_dynrank():
    """Attributes that classes of dynrank have."""
    found = set()
    for tree in TREES.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                found |= {part.name for part in node.body if isinstance(part, ast.FunctionDef)}
                fields = (part for part in node.body if isinstance(part, ast.AnnAssign))
                found |= {part.target.id for part in fields if isinstance(part.target, ast.Name)}
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_self(node.value):
                found.add(node.attr)
    return found


def found():
    """{name: ("read" and "replaced", the files)}"""
    fields = fields_of_dynrank()
    texts = own_texts()
    writes = Writes(TREES.values(), fields - OF_BOTH)
    names = defaultdict(lambda: (set(), set()))
    for file, tree in TREES.items():
        uses = [(name, "read") for name in private_names(tree, fields, texts)]
        uses += [(name, "replaced") for name in writes.of(tree) if name not in OF_MADE_HERE]
        for name, kind in uses:
            names[name][0].add(kind)
            names[name][1].add(file)
    return names


def rows():
    """(names, kinds, files) of each row of the table."""
    lines = (ROOT / "foreign.md").read_text(encoding="utf-8").splitlines()
    table = [line.strip("| ").split(" | ") for line in lines if line.startswith("|")][2:]
    return [
        (names.strip("`").split("`, `"), {*kinds.split(", ")}, {*files.split(", ")})
        for _, names, kinds, files, _ in table
    ]


def test_the_table_has_every_private_name_and_every_write_and_where():
    used = found()
    listed = [name for names, _, _ in rows() for name in names]
    assert sorted(listed) == sorted(used)
    for names, kinds, files in rows():
        uses = [used[name] for name in names]
        assert (kinds, files) == (set.union(*(kind for kind, _ in uses)), set.union(*(where for _, where in uses))), (
            names
        )


def test_the_table_is_short():
    assert len(rows()) <= 60


@pytest.mark.parametrize(
    ("program", "names"),
    [
        ("from torch._subclasses import FakeTensor", {"_subclasses"}),
        ("trainer.fit_loop._results", {"_results"}),
        ("getattr(model, '_secret', None)", {"_secret"}),
        ("self._mine = other._theirs", {"_theirs"}),
    ],
)
def test_a_private_name_is_found_wherever_it_stands(program, names):
    assert {*private_names(ast.parse(program), {"_mine"}, set())} == names


def written(program):
    tree = ast.parse(program)
    return {*Writes([tree], {"ours"}).of(tree)}


@pytest.mark.parametrize(
    ("program", "name"),
    [
        ("trainer.fit_loop.run = 1", "run"),
        ("self.trainer.run = 1", "run"),
        ("a, trainer.run = 1, 2", "run"),
        ("x.run[0] = 1", "run"),
        ("setattr(x, name, 1)", "setattr(x)"),
        ("def fit(trainer):\n    trainer.ours = 1", "ours"),
        ("del x.run", "run"),
        ("delattr(x, 'run')", "run"),
        ("patch.object(x, 'run', ours)", "run"),
        ("vars(x).update(run=1)", "vars(x)"),
        ("vars(x)['run'] = 1", "vars(x)"),
        ("own = vars(x)\nown['run'] = 1", "vars(x)"),
        ("own = vars(x)\nown.update(before)", "vars(x)"),
        ("own = vars(x)\nown.update(dict.fromkeys(before))", "vars(x)"),
        ("own = vars(x)\ndel own['run']", "vars(x)"),
        ("getattr(x, name).clear()", "getattr(x)"),
        ("scheduler.get_last_lr()[0] = 1", "get_last_lr"),
        ("base_lrs = scheduler.base_lrs\nbase_lrs[0] = 1", "base_lrs"),
        ("base_lrs = getattr(scheduler, 'base_lrs', [])\nbase_lrs[0] = 1", "base_lrs"),
        ("def multiply(base_lrs):\n    base_lrs[0] = 1", "base_lrs"),
        ("def multiply(lrs):\n    lrs[0] = 1\nmultiply(scheduler.base_lrs)", "base_lrs"),
        ("for group in optimizer.param_groups:\n    group['lr'] = 1", "param_groups"),
        ("for i, (group, rate) in enumerate(zip(x.param_groups, [1])):\n    group['params'] = []", "param_groups"),
        (
            "class A:\n def f(self):\n  self.a = [(g, 1) for g in x.groups]\n  for g, _ in self.a:\n   g['lr'] = 1",
            "groups",
        ),
        ("groups = optimizer.param_groups\ngroups.append({})", "param_groups"),
        ("groups = optimizer.param_groups\ngroups += [{}]", "param_groups"),
        ("del optimizer.param_groups[1:]", "param_groups"),
        ("state.log_history.append({})", "log_history"),
        ("optimizer.state.pop(parameter)", "state"),
        ("partial(model.configs.__setitem__, name)", "model.configs"),
    ],
)
def test_a_write_into_an_object_of_others_is_found(program, name):
    assert written(program) == {name}


@pytest.mark.parametrize(
    "program",
    [
        "self.run = 1",
        "x = Made()\nx.run = 1",
        "x = copy(y)\nvars(x).update(run=1)",
        "found = {}\nfound[1] = 2\nfound.update(y)",
        "found = [*x.groups]\nfound.append(1)",
        "def fill(found):\n    found[0] = 1\nfill([])",
        "class A:\n    pass\ndef f(a: A):\n    a.ours = 1",
        "class A:\n    def f(self, x):\n        self.a = {}\n        self.a[1] = x.groups",
        "count = x.count\ncount += 1",
        "handle.remove()",
    ],
)
def test_a_write_into_an_object_of_its_own_is_none(program):
    assert written(program) == set()


# Those whose loss no other test would notice.


def test_a_model_of_fabric_is_known():
    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-true")
    model = nn.Linear(2, 2)
    wrapped, _ = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert (private.is_fabrics(wrapped), private.is_fabrics(model)) == (True, False)


def test_names_of_transformers_are_there():
    config = BertConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    model = BertModel(config)
    assert (private.source_of(model), private.source_of(nn.Linear(1, 1))) == ("", "")
    model.config.name_or_path = "a/b"
    assert private.source_of(model) == "a/b"
    experts = MixtralExperts(MixtralConfig(hidden_size=8, intermediate_size=4, num_local_experts=2))
    up = torch.randn(3, 8)
    torch.testing.assert_close(private.gated(experts, up), nn.functional.silu(up[:, :4]) * up[:, 4:])
    assert not private.is_expert_parallel(experts)
