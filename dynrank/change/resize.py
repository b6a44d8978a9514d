"""The public change of ranks in a model: check all, compute all, then assign all at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import nn
from torch.optim import Optimizer

from dynrank.change.change import Adapters, Change, Ranks
from dynrank.change.directions import LayerDirections
from dynrank.change.interrupts import uninterrupted
from dynrank.change.reports import LayerReport
from dynrank.distributed.sharding import check_whole
from dynrank.distributed.wrappers import ddp_modules
from dynrank.patterns import by_layer


# Optimizers could not step on state that inference mode has made (Lightning validates in it).
@torch.inference_mode(False)
@torch.no_grad()
def resize(
    model: nn.Module,
    target: Ranks,
    *,
    optimizers: Iterable[Optimizer],
    optimizer_state: Literal["transport", "reset"] = "transport",
    generator: torch.Generator | None = None,
    balance: bool = False,
    dry_run: bool = False,
) -> list[LayerReport]:
    """Change the rank of LoRA layers in place, down or up, and carry the optimizers' state through the change.

    A cut keeps the largest directions, which approximate the update best. Growth does not change the function. The
    scaling stays the same. The Parameter objects stay the same, too, so optimizers, param groups, schedulers and hooks
    remain valid. Gradients are deleted, so call this between two steps.
    All or nothing: everything is checked and computed before the first layer changes, and after an interrupt (Ctrl-C)
    either nothing or everything has changed. In several processes, :class:`dynrank.RankDriver` sends all the same.

    Args:
        model: a model with LoRA layers, dynrank's or PEFT's; if DDP wraps it, the wrapped model, so that DDP follows.
        target: the new rank of every layer, up or down, or {key: new rank} for some. A key is a layer's name,
            which goes before all others, "attention", "mlp", or a pattern as in a rank map, of which the first that
            matches a layer wins.
        optimizers: all optimizers of the layers' parameters, also after training if they go on later; () if there are
            none. An optimizer that is left out keeps state of the old shapes, and its next step fails.
        optimizer_state: "transport" carries the moments through the change, "reset" deletes them.
        generator: generator of the random rows of a growth; torch's default generator when None.
        balance: whether layers in ``target`` that keep their rank get balanced factors, too, unless another layer
            grows; their update stays the same up to rounding. Pinned layers are left alone.
        dry_run: check and compute everything, but change nothing.

    Returns:
        A report per layer with new factors (``layer``, ``rank_before``, ``rank_after``, ``energy_kept``, …), in model
        order; a layer that has its new rank already is left out, unless it was balanced.

    Raises:
        ConfigurationError: if there are no LoRA layers, a key or rank cannot be used, a factor holds NaN or inf (it
            names the layer), or an optimizer's state cannot be carried.
        RuntimeError: if one of PEFT's layers is merged.

    >>> import torch, dynrank
    >>> model = dynrank.add_lora(torch.nn.Sequential(torch.nn.Linear(8, 8)), rank=4)
    >>> optimizer = torch.optim.AdamW(dynrank.adapter_parameters(model))
    >>> [(layer.layer, layer.rank_after) for layer in dynrank.resize(model, 2, optimizers=[optimizer])]
    [('0', 2)]
    """
    check_whole(model)
    adapters = Adapters(model, optimizers, ddp=ddp_modules(model))
    directions = LayerDirections(adapters.layers)
    ranks = by_layer(target, adapters.layers) if isinstance(target, Mapping) and adapters.layers else target
    free = [name for name, layer in adapters.layers.items() if not layer.bounds.pinned]
    balanced = free if balance else ()
    change = Change.compute(adapters, lambda: ranks, directions, optimizer_state, generator, balanced=balanced)
    if not dry_run:
        with uninterrupted():
            change.apply()
    return change.reports
