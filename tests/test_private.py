"""``dynrank/foreign.md`` names all that dynrank reads or replaces in other libraries beyond their public interface."""

import ast
import re
from collections import defaultdict
from pathlib import Path

import pytest
import torch
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
# The methods of a namedtuple, which have an underscore so that they clash with no field; Hydra's key of a class.
PUBLIC = {"_asdict", "_replace", "_target_"}
# Parts of names that dynrank itself gives.
OURS = {"_0", "_bias", "_bytes", "_frozen_base", "_sd", "_size"}
# Attributes of objects that dynrank has made: tables, configurations, signatures, errors, Python's own settings.
OF_MADE_HERE = {"__signature__", "args", "argv", "caption", "filters", "maxlevel", "maxother", "maxstring", "min_width"}
OF_MADE_HERE |= {"check_val_every_n_epoch", "max_epochs", "max_steps", "environ", "schedule", "val_check_interval"}
ROW = re.compile(
    r"^\| (?P<library>[^|]+) \| `(?P<name>[^`]+)` \| (?P<kind>read|replaced) \| (?P<files>[^|]+) \| .+ \|$", re.M
)


def is_private(name):
    return len(name) > 1 and name.startswith("_") and not name.startswith("__") and name.isidentifier()


def own_texts():
    """Names that dynrank itself gives to functions, classes and variables."""
    nodes = [node for tree in TREES.values() for node in ast.walk(tree)]
    named = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    return named | {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}


def is_self(node):
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def private_names(tree, fields, texts):
    """Names with an underscore that are not dynrank's own: imported, behind an object, or as a text for getattr."""
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("dynrank"):
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Attribute) and node.attr not in fields:
            names = [node.attr]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value not in fields | texts:
            names = [node.value]
        yield from (name for name in names if is_private(name) and name not in OURS | PUBLIC)


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


# Attributes of other libraries' objects that have the name of one of ours.
OF_BOTH = {"callbacks", "data", "forward", "init_lora_weights", "load_checkpoint", "optimizers", "problem_type"}
OF_BOTH |= {"lora_alpha", "r", "run", "state", "train", "use_rslora", "weight"}


def replaced_names(tree, fields):
    """Attributes of objects other than self that are assigned, and are no fields of dynrank's own classes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and not is_self(node.value):
            if node.attr not in fields - OF_BOTH | OF_MADE_HERE:
                yield node.attr
        # An entry of a mapping or list that is theirs.
        elif (
            isinstance(node, ast.Subscript)
            and isinstance(node.ctx, ast.Store)
            and isinstance(node.value, ast.Attribute)
        ):
            attribute = node.value
            if not is_self(attribute.value) and attribute.attr not in fields - OF_BOTH | OF_MADE_HERE:
                yield attribute.attr
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "setattr" and not is_self(node.args[0]):
            yield f"setattr({ast.unparse(node.args[0])})"


def found():
    """{(name, "read" or "replaced"): the files}"""
    fields = fields_of_dynrank()
    texts = own_texts()
    names = defaultdict(set)
    for file, tree in TREES.items():
        for name in private_names(tree, fields, texts):
            names[name, "read"].add(file)
        for name in replaced_names(tree, fields):
            names[name, "replaced"].add(file)
    return names


def listed():
    text = (ROOT / "foreign.md").read_text(encoding="utf-8")
    return {(row["name"], row["kind"]): {*row["files"].split(", ")} for row in ROW.finditer(text)}


def test_the_table_has_every_private_name_and_every_replaced_field_and_where():
    assert listed() == found()


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


@pytest.mark.parametrize(
    "program", ["trainer.fit_loop.run = ours", "self.trainer.run = ours", "a, trainer.run = 1, 2", "x.run[0] = 1"]
)
def test_a_replaced_method_is_found(program):
    assert [*replaced_names(ast.parse(program), {"run"})] == ["run"]


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
