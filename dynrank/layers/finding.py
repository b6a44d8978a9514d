"""The LoRA layers of a model, their parameters, and the plain modules around them."""

from collections import Counter
from collections.abc import Iterable, Iterator
from math import prod

from torch import Tensor, nn

from dynrank.errors import ConfigurationError
from dynrank.layers.compiled import named_modules, uncompiled
from dynrank.layers.experts import LoRAOwner, LoRAParameter, expert_stacks, router_weight
from dynrank.layers.lora_layer import LoRALayer
from dynrank.layers.peft_layers import peft_layers
from dynrank.layers.ranked_layer import RankedLayer


def lora_layers(model: nn.Module) -> Iterator[tuple[str, RankedLayer]]:
    """Every LoRA layer of ``model`` with its name, in the order of ``named_modules()``.

    Names are those without the wrappers of ``torch.compile``. In a model wrapped by PEFT the layers are views of PEFT's
    layers, for the active adapter.

    >>> import torch, dynrank
    >>> model = dynrank.add_lora(torch.nn.Sequential(torch.nn.Linear(8, 8)), rank=4)
    >>> [(name, layer.rank, layer.lora_A.shape, layer.lora_B.shape) for name, layer in dynrank.lora_layers(model)]
    [('0', 4, torch.Size([4, 8]), torch.Size([8, 4]))]
    """
    own = own_layers(model)
    theirs = peft_layers(model)
    if own and theirs:
        raise ConfigurationError(
            f"the model holds LoRA layers of dynrank ({next(iter(own))!r}) and of PEFT ({next(iter(theirs))!r}); "
            "use one of the two"
        )
    yield from own.items()
    yield from theirs.items()


def adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
    """lora_A and lora_B of every LoRA layer of ``model``, layer by layer; errors as in :func:`lora_layers`.

    >>> import torch, dynrank
    >>> model = dynrank.add_lora(torch.nn.Sequential(torch.nn.Linear(8, 8)), rank=4)
    >>> optimizer = torch.optim.AdamW(dynrank.adapter_parameters(model), lr=1e-3)
    >>> [tuple(factor.shape) for factor in dynrank.adapter_parameters(model)]
    [(4, 8), (8, 4)]
    """
    return [factor for _, layer in lora_layers(model) for factor in (layer.lora_A, layer.lora_B)]


def own_layers(model: nn.Module) -> dict[str, LoRALayer]:
    """The LoRA layers of dynrank in ``model``, by the names of the modules or parameters that they adapt."""
    found = {}
    for name, layer in named_modules(model):
        if isinstance(layer, LoRAParameter):
            # ``...experts.gate_up_proj``, as in PEFT, for the layer ``...experts.lora.gate_up_proj``.
            name = name.removesuffix(f"lora.{layer.base.leaf}") + layer.base.leaf
        if isinstance(layer, LoRALayer):
            found[name] = layer
    return found


def plain_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every (name, module) of ``model`` with bases instead of their LoRA layers, and every bare parameter."""
    found: list[tuple[str, nn.Module]] = [("", model)]
    while found:
        name, module = found.pop()
        module = uncompiled(module)
        if isinstance(module, LoRALayer | LoRAOwner):
            module = module.base
        yield name, module
        children = {**module._modules, **expert_stacks(module), **router_weight(module)}
        below = ((f"{name}.{key}" if name else key, child) for key, child in children.items())
        found += reversed([(key, child) for key, child in below if child is not None])


def own_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    """(name, parameter or buffer) of ``module`` itself, by all names of those that have several."""
    parameters = module.named_parameters(recurse=False, remove_duplicate=False)
    return [*parameters, *module.named_buffers(recurse=False, remove_duplicate=False)]


def modules_by_name(model: nn.Module) -> dict[str, nn.Module]:
    """:func:`plain_modules`, each by the first of its names only, which is the name in PEFT."""
    first_names = {module: name for name, module in reversed([*plain_modules(model)])}
    return {name: module for module, name in reversed(first_names.items())}


def tied_weights(model: nn.Module) -> set[int]:
    """Ids of the parameters that have more than one name."""
    names = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    return {parameter for parameter, count in names.items() if count > 1}


def parameter_count(parameters: Iterable[nn.Parameter]) -> int:
    """How many numbers ``parameters`` have; of those that bitsandbytes has packed, two in a byte, the unpacked ones."""
    shapes = (getattr(getattr(parameter, "quant_state", None), "shape", parameter.shape) for parameter in parameters)
    return sum(prod(shape) for shape in shapes)
