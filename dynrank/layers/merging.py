"""Merging LoRA layers into their bases."""

from typing import Any, TypeVar

from torch import nn

from dynrank.errors import ConfigurationError
from dynrank.layers.bare import LoRAOwner
from dynrank.layers.finding import own_layers, tied_weights
from dynrank.layers.peft_layers import refuse_peft
from dynrank.layers.placing import replace_modules
from dynrank.layers.quantized import is_quantized, mark_unpacked, unpack_fault

M = TypeVar("M", bound=nn.Module)


def merge(model: M) -> M:
    """Add the update of every LoRA layer to its base and replace the layer by the base, in place.

    If a head is tied to an embedding, the head gets its own weight, because the update belongs to the head only; the
    model's config then says that the two are not tied. A base that bitsandbytes has packed into 4 bits is unpacked.
    Weights keep their dtype; the sum is computed in float32 or wider.

    Raises:
        ConfigurationError: if the model has no LoRA layers, or PEFT's, or a base is packed into 8 bits.
    """
    refuse_peft(model, "merge", "call its merge_and_unload()")
    layers = own_layers(model)
    if not layers:
        raise ConfigurationError("the model has no LoRA layers to merge")
    packed = {name: layer.base for name, layer in layers.items() if is_quantized(layer.base)}
    faults = [f"{name!r}: {fault}" for name, base in packed.items() if (fault := unpack_fault(base))]
    if faults:
        raise ConfigurationError("the model cannot be merged:\n  " + "\n  ".join(faults[:20]))
    tied = tied_weights(model)
    if any(id(layer.weight) in tied for layer in layers.values()):
        for module in model.modules():
            config: Any = getattr(module, "config", None)
            if getattr(config, "tie_word_embeddings", False):
                config.tie_word_embeddings = False
    # Layer by layer, so that an interrupted merge counts no update twice.
    for layer in layers.values():
        replace_modules(model, {id(layer): layer.merge()})
    replace_modules(model, {id(module): module.base for module in model.modules() if isinstance(module, LoRAOwner)})
    mark_unpacked(model)
    return model
