"""Adapters from disk into a model, plain or live: everything is checked before anything changes."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from dynrank.adapters.call_lock import call_lock_of
from dynrank.adapters.exchange import AdapterChange
from dynrank.adapters.read import Adapter, read_adapter
from dynrank.errors import ConfigurationError
from dynrank.layers.finding import own_layers
from dynrank.layers.peft_layers import refuse_peft

M = TypeVar("M", bound=nn.Module)


def load_adapter(
    model: M, path: str | Path | Adapter, *, dtype: torch.dtype = torch.float32, group: bool | None = None
) -> M:
    """Put the LoRA layers of a PEFT adapter (ours or PEFT's) into a plain model, in place, and load them.

    Ranks and scaling come from the settings by PEFT's rules. Everything is checked before the model is touched.

    Args:
        model: the model that the adapter was trained on, without LoRA layers.
        path: folder with adapter_config.json and adapter_model.safetensors, or what :func:`read_adapter` returned.
        dtype: dtype of the factors.
        group: as for :func:`dynrank.add_lora`.

    Returns:
        ``model`` itself; adapters and saved heads are trainable, all else is frozen.

    Raises:
        ConfigurationError: if a file is missing, broken or not a LoRA adapter, uses a variant with other arithmetic, or
            does not fit the model.
    """
    refuse_peft(model, "load_adapter", "call its load_adapter(), or pass the plain model")
    if own_layers(model):
        raise ConfigurationError(
            "the model has LoRA layers already; take another adapter with dynrank.swap_adapter, merge them "
            "(dynrank.merge) or load a plain model"
        )
    change = AdapterChange(model, path if isinstance(path, Adapter) else read_adapter(path), dtype)
    with call_lock_of(model).closed():
        change.put(keep_base=False, group=group)
    return model


def swap_adapter(model: M, adapter: str | Path | Adapter, *, dtype: torch.dtype = torch.float32) -> M:
    """Give a model, plain or adapted, this adapter in the place of the one that it has; it may be in use meanwhile.

    Ranks, scaling and adapted layers may all differ: a layer that the adapter does not name goes back to its base. The
    new layers are complete before the model is touched, and are exchanged when no thread is in a call of the model or
    in its ``generate``: each forward and each generated text sees one adapter or the other. So the swap waits for texts
    that are being written; those begun later wait for it. A call that waits for another thread to call the same model
    would wait for ever.

    Calls are known from the first ``load_adapter`` or ``swap_adapter`` of a model on: one that is under way when a
    model gets its very first adapter by a swap may see both states. :func:`dynrank.adapters.call_lock.call_lock_of`
    says what else is not seen, and protects loops of your own.

    The layers are new objects with new parameters: what held the old ones (an optimizer, a RankScheduler) has to be
    made anew to train on, and compiled code is compiled again. A backward pass must not be under way.

    Args:
        model: the model that the adapter was trained on; if compiled by ``torch.compile(model)``, what that returned.
        adapter: a folder with adapter_config.json and adapter_model.safetensors, or what :func:`read_adapter` returned.
        dtype: dtype of the factors.

    Returns:
        ``model`` itself; adapters and saved heads are trainable, all else is frozen.

    Raises:
        ConfigurationError: as :func:`load_adapter`, or if a part that was trained whole would keep the values of the
            adapter before; nothing has changed then.
        RuntimeError: if this is called within the model's own forward or generate.
    """
    refuse_peft(model, "swap_adapter", "call its load_adapter() and set_adapter()")
    change = AdapterChange(model, adapter if isinstance(adapter, Adapter) else read_adapter(adapter), dtype)
    with call_lock_of(model).closed():
        change.put(keep_base=True, group=vars(model).get("_groups_layers"))
    return model
