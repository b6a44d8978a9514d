"""Which modules of a model get LoRA: by name, by pattern, or by preset."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from difflib import get_close_matches

from torch import nn
from transformers.pytorch_utils import Conv1D

from dynrank.errors import ConfigurationError
from dynrank.layers.adapted import layer_class

PRESETS = ("attention", "all-linear")
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
# Their forward hands the weights of their children to a fused function, past the children's own forward.
_PAST_CHILDREN = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
_CLASSIFIERS = ("classifier", "score")  # the fresh heads of transformers' ...ForSequenceClassification


def target_names(model: nn.Module, target_modules: str | Sequence[str]) -> list[str]:
    """Names of the modules to adapt, in the order of ``model.named_modules()``.

    Args:
        model: any module.
        target_modules: a list of names, each matching a module's whole name or its trailing parts (as in PEFT); or a
            preset: ``all-linear`` (every linear layer but the output head), ``attention`` (those of them below a module
            named after attention); or a regular expression for whole names.

    Raises:
        ConfigurationError: if nothing matches, an entry of the list matches nothing, or a match cannot have LoRA.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    bypassed = {
        f"{name}.{child}"
        for name, module in modules.items()
        if isinstance(module, _PAST_CHILDREN)
        for child, _ in module.named_modules()
        if child
    }
    if isinstance(target_modules, str) and target_modules in PRESETS:
        heads = set(_output_heads(model))
        names = [
            name
            for name, module in modules.items()
            if isinstance(module, nn.Linear | Conv1D) and id(module) not in heads and name not in bypassed
        ]
        if target_modules == "attention":
            names = [name for name in names if _ATTENTION.search(name.rpartition(".")[0])]
    elif isinstance(target_modules, str):
        try:
            names = [name for name in modules if re.fullmatch(target_modules, name)]
        except re.error as error:
            raise ConfigurationError(
                f"lora.target_modules must be a list, a regular expression or one of {PRESETS}, "
                f"got {target_modules!r}: {error}"
            ) from None
    else:
        names = [name for name in modules if any(_ends_with(name, target) for target in target_modules)]
        for target in target_modules:
            if not any(_ends_with(name, target) for name in names):
                near = get_close_matches(target, {name.rpartition(".")[2] for name in modules} | set(modules), n=3)
                raise ConfigurationError(f"no layer matches {target!r} of lora.target_modules; nearest: {near}")
    if not names:
        kinds = sorted({name.rpartition(".")[2] for name, module in modules.items() if layer_class(module)})
        raise ConfigurationError(f"no layer matches lora.target_modules={target_modules!r}; layers end in: {kinds}")
    for name in names:
        if name in bypassed:
            raise ConfigurationError(
                f"{name!r} cannot have LoRA: its parent reads the weight past the layer's forward; "
                "change lora.target_modules"
            )
        if layer_class(modules[name]) is None:
            raise ConfigurationError(
                f"{name!r} cannot have LoRA: {type(modules[name]).__name__} is no plain Linear, Conv1D, Embedding or "
                "Conv2d; change lora.target_modules"
            )
    return names


def _ends_with(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _output_heads(model: nn.Module) -> Iterator[int]:
    """Ids of the modules that PEFT's all-linear leaves out: output embeddings and classification heads."""
    for module in model.modules():
        output_embeddings = getattr(module, "get_output_embeddings", None)
        head = output_embeddings() if callable(output_embeddings) else None
        if head is not None:
            yield id(head)
        if type(module).__name__.endswith("ForSequenceClassification"):
            yield from (id(getattr(module, name)) for name in _CLASSIFIERS if hasattr(module, name))
