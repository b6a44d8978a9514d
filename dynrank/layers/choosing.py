"""The choice of the modules that get LoRA: by name, by pattern, or by preset."""

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches

from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from dynrank.errors import ConfigurationError
from dynrank.layers.compiled import compiled_alone, named_modules
from dynrank.layers.experts import ExpertStack
from dynrank.layers.finding import modules_by_name, parameter_count
from dynrank.layers.foreign import class_if_imported
from dynrank.layers.kinds import OFFLOADED, is_offloaded, layer_class
from dynrank.patterns import EXPRESSION_ERRORS, kind_of

PRESETS = ("attention", "all-linear")
# Their forward passes the children's weights to a fused function and does not call the children.
_PAST_CHILDREN = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
# What the attention of WavLM passes to such a function.
_OF_WAVLM = ["q_proj", "k_proj", "v_proj", "out_proj"]
# Kernels of state-space layers (Mamba) read the weights of these on CUDA; on other devices the layers are called.
_OF_MAMBA = ["x_proj", "dt_proj", "out_proj"]
# The names of the new heads of transformers' ...ForSequenceClassification.
_CLASSIFIERS = ("classifier", "score")


def target_names(model: nn.Module, target_modules: str | Sequence[str], trained_whole: Sequence[str] = ()) -> list[str]:
    """The names of the modules to adapt, in the order of ``model.named_modules()``.

    Args:
        model: any module.
        target_modules: a list of names, a preset, or a regular expression for whole names. A name in a list matches a
            module's whole name or its trailing parts (as in PEFT), and a list may hold presets (``["all-linear",
            "lm_head"]``). ``all-linear`` is every linear layer and stack of experts except the output head;
            ``attention`` is those of them inside a module with attn or attention in its name. Presets skip linear
            layers that compute something else than ``x W^T + b``.
        trained_whole: names of modules that are trained without LoRA; presets leave them out.
    """
    modules = modules_by_name(model)
    outside = _outside(modules, trained_whole)
    del modules[""]
    presets, skipped = _presets(model, {name: module for name, module in modules.items() if name not in outside})
    found = dict(presets)
    targets = [target_modules] if isinstance(target_modules, str) else list(target_modules) or [""]
    for target in targets:
        if target not in presets:
            found[target] = _matches(target, modules, is_expression=isinstance(target_modules, str))
        if not found[target]:
            # The error lists the nearest names, or the names of all layers.
            layers = sorted({name.rpartition(".")[2] for name, module in modules.items() if layer_class(module)})
            near = get_close_matches(target, {*layers, *modules}, n=3) or layers
            raise ConfigurationError(
                f"no layer matches {target!r} of target_modules; nearest: {near}", "target_modules"
            )
    wanted = {name for target in targets for name in found[target]}
    chosen = [name for name in modules if name in wanted]
    alone = compiled_alone(model)
    for name in chosen:
        if name in outside:
            reason = outside[name]
        elif id(modules[name]) in alone:
            reason = "torch.compile has wrapped this module alone and would still call it; compile the model afterwards"
        elif is_offloaded(modules[name]):
            reason = OFFLOADED
        elif layer_class(modules[name]) is None:
            kind = type(modules[name]).__name__
            reason = f"{kind} is no plain Linear, Conv1D, Embedding, Conv2d or stack of experts, or computes its weight"
        else:
            continue
        raise ConfigurationError(f"{name!r} cannot have LoRA: {reason}", "target_modules")
    if "all-linear" in targets:
        stacks = [module for module in map(modules.get, chosen) if isinstance(module, ExpertStack)]
        _warn_of_frozen(model, [stack.weight for stack in stacks], skipped)
    return chosen


def _outside(modules: Mapping[str, nn.Module], trained_whole: Sequence[str]) -> dict[str, str]:
    """{name of a module that cannot have LoRA because of where it is: the reason}; presets leave it out."""
    whole = "it is in modules_to_save"
    outside = {n: whole for n in modules if any(f"{n}.".startswith(f"{saved}.") for saved in trained_whole)}
    for name, module in modules.items():
        for child in _past_forward(module):
            outside[f"{name}.{child}".removeprefix(".")] = (
                f"its parent reads the weight past the layer's forward (in {type(module).__name__})"
            )
    return outside


def _past_forward(module: nn.Module) -> list[str]:
    """Names of the modules in ``module`` whose weights it reads without calling them, at least on some device."""
    if isinstance(module, _PAST_CHILDREN):
        return [child for child, _ in module.named_modules() if child]
    if isinstance(module, class_if_imported("transformers.models.wavlm.modeling_wavlm.WavLMAttention")):
        return _OF_WAVLM
    # Gated delta nets have A_log, too, but call all their layers.
    return _OF_MAMBA if hasattr(module, "A_log") and hasattr(module, "in_proj") else []


def _presets(model: nn.Module, modules: Mapping[str, nn.Module]) -> tuple[dict[str, list[str]], dict[str, nn.Module]]:
    """({preset: names}, {name: linear layer that presets skip because it computes something else than a plain one})."""
    heads = set(_output_heads(model))
    kinds = (nn.Linear, class_if_imported("transformers.pytorch_utils.Conv1D"), ExpertStack)
    found = {name: module for name, module in modules.items() if isinstance(module, kinds) and id(module) not in heads}
    linear = [name for name, module in found.items() if layer_class(module) is not None]
    attention = [name for name in linear if kind_of(name) == "attention"]
    skipped = {name: module for name, module in found.items() if name not in linear}
    return {"all-linear": linear, "attention": attention}, skipped


def _matches(target: str, modules: Mapping[str, nn.Module], *, is_expression: bool) -> list[str]:
    """Names of the modules that a regular expression matches, or a name in a list."""
    if not is_expression:
        return [name for name in modules if f".{name}".endswith(f".{target}")]
    try:
        return [name for name in modules if re.fullmatch(target, name)]
    except EXPRESSION_ERRORS as error:
        raise ConfigurationError(
            f"target_modules must be a list, a regular expression or one of {PRESETS}, got {target!r}: {error}",
            "target_modules",
        ) from None


def _output_heads(model: nn.Module) -> Iterator[int]:
    """Ids of the modules that PEFT's all-linear leaves out: output embeddings and classification heads."""
    for module in model.modules():
        output_embeddings = getattr(module, "get_output_embeddings", None)
        head = output_embeddings() if callable(output_embeddings) else None
        if head is not None:
            yield id(head)
        if type(module).__name__.endswith("ForSequenceClassification"):
            yield from (id(getattr(module, name)) for name in _CLASSIFIERS if hasattr(module, name))


def _warn_of_frozen(model: nn.Module, adapted: Iterable[Tensor], skipped: Mapping[str, nn.Module]) -> None:
    """Warn about the share of the model in linear layers that have no LoRA and stay frozen.

    ``adapted`` are the stacked weights (of experts) that have LoRA. ``skipped`` are linear layers without it, by name.
    """
    trained = {id(weight) for weight in adapted}
    stacks = {
        f"{name}.{leaf}": parameter.numel()
        for name, module in named_modules(model)
        if not isinstance(module, nn.Conv1d | nn.ConvTranspose1d | ParametrizationList)
        for leaf, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 3 and len(parameter) > 1 and id(parameter) not in trained
    }
    others = {name: sum(weight.numel() for weight in module.parameters()) for name, module in skipped.items()}
    if stacks or others:
        share = sum([*stacks.values(), *others.values()]) / parameter_count(model.parameters())
        kinds = [f"{len(stacks)} parameters that stack layers, such as {next(iter(stacks))!r}"] if stacks else []
        kinds += [f"{len(others)} layers other than x W^T + b, such as {next(iter(others))!r}"] if others else []
        warnings.warn(f"{share:.0%} of the model stays frozen: {' and '.join(kinds)}", stacklevel=2)
