"""Private names are used by their modules alone, and those whose loss no other test would notice are there."""

import ast
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
# Those that may use them.
OWNERS = ("private.py", "callbacks/lightning/private.py", "distributed/wrappers.py")
FOREIGN = {"torch", "transformers", "lightning", "peft", "accelerate", "hydra", "omegaconf", "datasets"}


def private_names(path):
    """The private modules and names of libraries that a file imports or asks a library's module for."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Attribute):
            names = ast.unparse(node).split(".")
        else:
            continue
        if names[0] in FOREIGN:
            yield from (name for name in names if name.startswith("_") and not name.startswith("__"))


@pytest.mark.parametrize("part", [path.name for path in ROOT.iterdir() if path.name not in ("conf", "__pycache__")])
def test_private_names_are_used_by_their_modules_alone(part):
    files = [ROOT / part] if part.endswith(".py") else [*(ROOT / part).rglob("*.py")]
    others = [file for file in files if str(file.relative_to(ROOT)) not in OWNERS]
    assert not [(file.name, name) for file in others for name in private_names(file)]


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


def test_names_of_fabric_are_there():
    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-true")
    model = nn.Linear(2, 2)
    wrapped, _ = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert (private.is_fabrics(wrapped), private.is_fabrics(model)) == (True, False)
