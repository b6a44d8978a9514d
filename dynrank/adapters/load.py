"""Loading adapters from disk into a model, even while it is in use: all is checked before anything changes."""

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

    Ranks and scaling come from the settings by PEFT's rules. Everything is checked before the model changes.

    Args:
        model: the model that the adapter was trained on, without LoRA layers.
        path: folder with adapter_config.json and adapter_model.safetensors, or what :func:`read_adapter` returned.
        dtype: dtype of the factors.
        group: as for :func:`dynrank.add_lora`.

    Returns:
        ``model`` itself; adapters and saved heads are trainable, all else is frozen.

    Raises:
        ConfigurationError: if a file is missing, broken or not a LoRA adapter, uses a variant with another formula, or
            does not fit the model.
    """
    refuse_peft(model, "load_adapter", "call its load_adapter(), or pass the plain model")
    if own_layers(model):
        raise ConfigurationError(
            "the model has LoRA layers already; replace them with dynrank.swap_adapter, merge them (dynrank.merge) or "
            "load a plain model"
        )
    change = AdapterChange(model, path if isinstance(path, Adapter) else read_adapter(path), dtype)
    with call_lock_of(model).closed():
        change.put(keep_base=False, group=group)
    return model


def swap_adapter(model: M, adapter: str | Path | Adapter, *, dtype: torch.dtype = torch.float32) -> M:
    """Replace the adapter of a model, if it has one, by this adapter; the model may be in use in other threads.

    Ranks, scaling and adapted layers may all differ: a layer that the new adapter does not name becomes its base layer
    again. All new layers are made first. They are exchanged when no thread is in a call of the model or its
    ``generate``, so each forward and each generated text uses only one of the adapters. The swap waits for running
    calls, and calls that begin later wait for the swap. If a call waits for another thread to call the same model, both
    wait forever.

    The first ``load_adapter`` or ``swap_adapter`` of a model begins to count calls: if a model gets its first adapter
    by a swap, a call that is running then may see both states. :func:`dynrank.adapters.call_lock.call_lock_of` says
    which other calls are not counted, and protects your own loops of several calls.

    The layers are new objects with new parameters. To continue training, make a new optimizer and a new RankScheduler;
    compiled code is compiled again. No backward pass may be running.

    Args:
        model: the model that the adapter was trained on, or what ``torch.compile(model)`` returned.
        adapter: a folder with adapter_config.json and adapter_model.safetensors, or what :func:`read_adapter` returned.
        dtype: dtype of the factors.

    Returns:
        ``model`` itself; adapters and saved heads are trainable, all else is frozen.

    Raises:
        ConfigurationError: as :func:`load_adapter`, or if a part that was trained whole would keep the previous
            adapter's values; nothing has changed then.
        RuntimeError: if this is called inside the model's own forward or generate.
    """
    refuse_peft(model, "swap_adapter", "call its load_adapter() and set_adapter()")
    change = AdapterChange(model, adapter if isinstance(adapter, Adapter) else read_adapter(adapter), dtype)
    with call_lock_of(model).closed():
        change.put(keep_base=True, group=vars(model).get("_groups_layers"))
    return model
