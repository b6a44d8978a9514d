"""Which modules of a model get LoRA: by name, by pattern, or by preset."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches

from torch import nn
from transformers.pytorch_utils import Conv1D

from dynrank.errors import ConfigurationError
from dynrank.layers.compiled import compiled_alone, named_modules
from dynrank.layers.kinds import layer_class

PRESETS = ("attention", "all-linear")
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
# Their forward hands the weights of their children to a fused function, past the children's own forward.
_PAST_CHILDREN = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
_CLASSIFIERS = ("classifier", "score")  # the fresh heads of transformers' ...ForSequenceClassification


def target_names(model: nn.Module, target_modules: str | Sequence[str], trained_whole: Sequence[str] = ()) -> list[str]:
    """Names of the modules to adapt, in the order of ``model.named_modules()``.

    Args:
        model: any module.
        target_modules: a list of names, each matching a module's whole name or its trailing parts (as in PEFT); or a
            preset: ``all-linear`` (every linear layer but the output head), ``attention`` (those of them below a module
            named after attention), which may stand in a list, too (``["all-linear", "lm_head"]``); or a regular
            expression for whole names.
        trained_whole: names of modules that are trained whole; presets leave them out.

    Raises:
        ConfigurationError: if nothing matches, an entry of the list matches nothing, or a match cannot have LoRA.
    """
    modules, alone = dict(named_modules(model)), compiled_alone(model)
    bypassed = {
        ".".join(filter(None, (name, child)))
        for name, module in modules.items()
        if isinstance(module, _PAST_CHILDREN)
        for child, _ in module.named_modules()
        if child
    }
    del modules[""]
    whole = {name for name in modules if any(f"{name}.".startswith(f"{saved}.") for saved in trained_whole)}

    def of_preset(preset: str) -> list[str]:
        return [name for name in _preset(preset, model, modules) if name not in bypassed | whole]

    if isinstance(target_modules, str):
        preset = target_modules in PRESETS
        names = of_preset(target_modules) if preset else _by_expression(target_modules, modules)
    elif isinstance(target_modules, Sequence) and all(isinstance(target, str) for target in target_modules):
        names = _by_list(
            target_modules, modules, {target: of_preset(target) for target in PRESETS if target in target_modules}
        )
    else:
        raise ConfigurationError(
            f"lora.target_modules must be a list, an expression or a preset, got {target_modules!r}"
        )
    if not names:
        kinds = sorted({name.rpartition(".")[2] for name, module in modules.items() if layer_class(module)})
        raise ConfigurationError(f"no layer matches lora.target_modules={target_modules!r}; layers end in: {kinds}")
    for name in names:
        if name in bypassed:
            reason = "its parent reads the weight past the layer's forward"
        elif name in whole:
            reason = "it is trained whole (modules_to_save)"
        elif id(modules[name]) in alone:
            reason = "torch.compile has wrapped it by itself and would go on calling it; compile the model afterwards"
        elif layer_class(modules[name]) is None:
            reason = f"{type(modules[name]).__name__} is no plain Linear, Conv1D, Embedding or Conv2d"
        else:
            continue
        raise ConfigurationError(f"{name!r} cannot have LoRA: {reason}; change lora.target_modules")
    return names


def _preset(preset: str, model: nn.Module, modules: Mapping[str, nn.Module]) -> list[str]:
    heads = set(_output_heads(model))
    linear = [name for name, m in modules.items() if isinstance(m, nn.Linear | Conv1D) and id(m) not in heads]
    return linear if preset == "all-linear" else [n for n in linear if _ATTENTION.search(n.rpartition(".")[0])]


def _by_expression(expression: str, modules: Mapping[str, nn.Module]) -> list[str]:
    try:
        return [name for name in modules if re.fullmatch(expression, name)]
    except re.error as error:
        raise ConfigurationError(
            f"lora.target_modules must be a list, a regular expression or one of {PRESETS}, got {expression!r}: {error}"
        ) from None


def _by_list(
    targets: Sequence[str], modules: Mapping[str, nn.Module], presets: Mapping[str, Sequence[str]]
) -> list[str]:
    matched: set[str] = set()
    for target in targets:
        found = presets[target] if target in presets else [name for name in modules if _ends_with(name, target)]
        if not found:
            near = get_close_matches(target, {name.rpartition(".")[2] for name in modules} | set(modules), n=3)
            raise ConfigurationError(f"no layer matches {target!r} of lora.target_modules; nearest: {near}")
        matched.update(found)
    return [name for name in modules if name in matched]


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
