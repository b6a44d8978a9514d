"""The fused op for PEFT's users: their layers get a subclass that computes by it, and nothing else of them changes."""

from __future__ import annotations

from importlib import import_module
from typing import TypeVar

from torch import nn

from dynrank.errors import ConfigurationError
from dynrank.layers.foreign import class_if_imported
from dynrank.layers.peft_layers import has_peft_layers

M = TypeVar("M", bound=nn.Module)

# {class of PEFT: its subclass with the op}, both by path, because dynrank does not import PEFT.
_CLASSES = {
    "peft.tuners.lora.layer.Linear": "dynrank.layers.peft_op.Linear",
    "peft.tuners.lora.layer.ParamWrapper": "dynrank.layers.peft_op.ParamWrapper",
    "peft.tuners.lora.bnb.Linear4bit": "dynrank.layers.peft_op_4bit.Linear4bit",
}


def apply_lora_kernel(model: M) -> M:
    """Let PEFT's LoRA layers in ``model`` compute by the fused op, in place.

    It pays where layers are wide, in bfloat16 or experts: less time, and about half of the memory for activations.
    Nothing else changes: not the parameters, their names, the files, or what PEFT's methods do. Linear layers, those
    packed by bitsandbytes into 4 bits, and experts' weights take part; others stay as they are. Each call decides.
    PEFT's modules are called for inputs for which the op does not pay (:func:`dynrank.kernels.backends.op_pays`), and
    wherever it would compute something else: with several active adapters, none, merged ones, DoRA and other variants,
    ``adapter_names``; with parts that are trained (but A and B), of other classes, with hooks, sharded or offloaded;
    under ``torch.compile``, ``torch.func`` and forward-mode AD.

    Call it before ``fully_shard`` of single layers, which otherwise stay PEFT's. A second call does nothing; layers
    that another adapter adds later need one.

    Args:
        model: a model with LoRA layers of PEFT.

    Returns:
        ``model`` itself.

    Raises:
        ConfigurationError: if ``model`` has no layers of PEFT.

    >>> import torch, dynrank
    >>> from peft import LoraConfig, get_peft_model
    >>> model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 8)), LoraConfig(target_modules=["0"]))
    >>> model = dynrank.apply_lora_kernel(model)
    """
    if not has_peft_layers(model):
        raise ConfigurationError(
            "apply_lora_kernel (kernel=True) is for LoRA layers of PEFT, and the model has none; call it behind "
            "get_peft_model. Layers of dynrank.add_lora have the op already",
            "kernel",
        )
    for theirs, ours in _CLASSES.items():
        plain = class_if_imported(theirs)
        for module in model.modules():
            # Subclasses compute something else, or are sharded.
            if type(module) is plain:
                module.__class__ = _class(ours)
    return model


def remove_lora_kernel(model: M) -> M:
    """Undo :func:`apply_lora_kernel`, in place: PEFT's layers have their own classes again.

    Call it before ``fully_shard`` of single layers: the classes that FSDP2 makes stay as they are.

    Returns:
        ``model`` itself.

    >>> import torch, dynrank
    >>> from peft import LoraConfig, get_peft_model
    >>> net = get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 8)), LoraConfig(target_modules=["0"]))
    >>> before = type(net.get_submodule("base_model.model.0"))
    >>> type(dynrank.apply_lora_kernel(net).get_submodule("base_model.model.0")) is before
    False
    >>> type(dynrank.remove_lora_kernel(net).get_submodule("base_model.model.0")) is before
    True
    """
    for module in model.modules():
        for theirs, ours in _CLASSES.items():
            if f"{type(module).__module__}.{type(module).__qualname__}" == ours:
                module.__class__ = class_if_imported(theirs)
    return model


def _class(path: str) -> type:
    module, _, name = path.rpartition(".")
    found: type = getattr(import_module(module), name)
    return found
