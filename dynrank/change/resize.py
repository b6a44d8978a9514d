"""The one place where the rank of a layer changes: check all, compute all, then replace all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dynrank.change.averages import averaged_layers, moved_average
from dynrank.change.choice import Choice
from dynrank.change.optimizer_rules import check_optimizer
from dynrank.change.optimizer_state import moved_states
from dynrank.change.replacement import Replacement
from dynrank.change.report import LayerReport, report_of
from dynrank.distributed.processes import copy_from_first, from_first
from dynrank.distributed.wrappers import unwrapped_optimizer
from dynrank.errors import ConfigurationError, diverged
from dynrank.layers.finding import lora_layers
from dynrank.layers.ranked import RankedLayer, max_rank, width_of
from dynrank.linalg import RankChange, grow_product, keep_directions, stacked


@torch.no_grad()
def resize(
    model: nn.Module,
    target: int | Mapping[str, int],
    *,
    optimizers: Iterable[Optimizer] = (),
    optimizer_state: Literal["transport", "reset"] = "transport",
    gates: Choice | None = None,
    averages: Iterable[nn.Module] = (),
    generator: torch.Generator | None = None,
    collective: bool = False,
    dry_run: bool = False,
) -> list[LayerReport]:
    """Change the rank of LoRA layers in place, down or up, and carry the optimizers' state through the change.

    A cut keeps the largest directions, which approximate the update best, or with ``gates`` those that the loss needs
    most. Growth does not change the function. The scaling stays the same. The Parameter objects stay the same, too, so
    optimizers, param groups, schedulers and hooks remain valid. Gradients are deleted, so call this between two steps.
    All or nothing: everything is checked and computed before the first layer changes, and after an interrupt (Ctrl-C)
    either nothing or everything has changed.

    Args:
        model: a model with LoRA layers, dynrank's or PEFT's.
        target: the new rank of every layer, or {layer name: new rank} for some.
        optimizers: all optimizers of the layers' parameters; the state of any other would keep the old shapes.
        optimizer_state: "transport" carries the moments through the change, "reset" deletes them.
        gates: measured gates of every direction, from steps since the last change; None chooses by weight.
        averages: moving averages of the model (torch's AveragedModel, or a copy with the same layers); the same maps
            change them, see :mod:`dynrank.change.averages`.
        generator: generator of the random rows of a growth; torch's default generator when None.
        collective: whether every process of torch's default group makes this call. Process 0 computes, and all
            processes get the bits of its factors, maps and optimizer state. Wrap the model in DDP again afterwards.
        dry_run: check and compute everything, but change nothing.

    Returns:
        A report per changed layer, in model order; a layer that has its new rank already is left out.

    Raises:
        ConfigurationError: if there are no LoRA layers, a name or rank cannot be used, a factor holds NaN or inf (it
            names the layer), an optimizer's state cannot be carried, or an average has other layers.
        RuntimeError: if one of PEFT's layers is merged.
    """
    optimizers = [unwrapped_optimizer(optimizer) for optimizer in optimizers]
    layers, targets = _changing(model, target)
    followers = averaged_layers(averages, layers)
    for optimizer in optimizers:
        factors = [factor for name in targets for factor in (layers[name].lora_A, layers[name].lora_B)]
        check_optimizer(optimizer, factors, optimizer_state)

    choice = gates if gates is not None else Choice(layers)
    shrunk = {name: rank for name, rank in targets.items() if rank < layers[name].rank}
    kept = {name: torch.arange(layers[name].rank) for name in targets} | (choice.kept(shrunk) if shrunk else {})

    def computed() -> dict[str, RankChange]:
        return {n: _change(n, layers[n], rank, kept[n], choice, generator) for n, rank in targets.items()}

    changes = _from_first(computed, layers) if collective else computed()
    new = _replacement(model, layers, changes, optimizer_state, optimizers, followers)
    if collective:
        # All processes have the same maps, but different machines may compute products with different bits.
        copy_from_first(new.made())
    loss = choice.change(kept)
    reports = []
    for name, change in changes.items():
        values = change.singular_values * layers[name].scaling
        width = width_of(layers[name])
        reports.append(report_of(name, targets[name], values, width, kept[name], loss.get(name)))

    if not dry_run:
        new.put()
    return reports


def _changing(model: nn.Module, target: int | Mapping[str, int]) -> tuple[dict[str, RankedLayer], dict[str, int]]:
    """(all LoRA layers by name, {name: new rank} for the layers whose rank changes), both in model order."""
    layers = dict(lora_layers(model))
    if not layers:
        raise ConfigurationError("the model has no LoRA layers; call dynrank.add_lora first")
    targets = dict(target) if isinstance(target, Mapping) else dict.fromkeys(layers, target)
    faults = []
    for name, rank in targets.items():
        if name not in layers:
            faults.append(f"no LoRA layer is named {name!r}")
            continue
        most = max_rank(layers[name])
        if not isinstance(rank, int) or isinstance(rank, bool):
            faults.append(f"{name!r}: rank must be an int, got {rank!r}")
        elif not 1 <= rank <= most:
            faults.append(f"{name!r}: rank must be between 1 and min(d_in, d_out) = {most}, got {rank}")
        if layers[name].merged:
            raise RuntimeError(f"{name!r} is merged; call unmerge_adapter() before changing its rank")
    if faults:
        raise ConfigurationError("ranks cannot be changed (schedule.final_rank or rank_map):\n  " + "\n  ".join(faults))
    return layers, {name: targets[name] for name in layers if name in targets and targets[name] != layers[name].rank}


def _change(
    name: str, layer: RankedLayer, rank: int, kept: Tensor, choice: Choice, generator: torch.Generator | None
) -> RankChange:
    """New factors and maps of a layer."""
    products = layer.products()
    if rank < layer.rank:
        pairs = zip(products, choice.directions(name), strict=True)
        return stacked([keep_directions(b, a, directions, kept) for (b, a), directions in pairs])
    try:
        return stacked([grow_product(b, a, rank, generator=generator) for b, a in products])
    except ValueError as error:
        raise diverged(name, error) from error


def _from_first(make: Callable[[], dict[str, RankChange]], layers: Mapping[str, RankedLayer]) -> dict[str, RankChange]:
    """What ``make`` returns in process 0, on the devices of the layers."""
    changes = from_first(lambda: {name: _to(change, torch.device("cpu")) for name, change in make().items()})
    return {name: _to(change, layers[name].lora_A.device) for name, change in changes.items()}


def _to(change: RankChange, device: torch.device) -> RankChange:
    return replace(change, **{key: value.to(device) for key, value in vars(change).items()})


def _replacement(
    model: nn.Module,
    layers: Mapping[str, RankedLayer],
    changes: Mapping[str, RankChange],
    optimizer_state: Literal["transport", "reset"],
    optimizers: Iterable[Optimizer],
    followers: Iterable[tuple[nn.Module, Mapping[str, RankedLayer]]],
) -> Replacement:
    """The new factors of the model and its averages, and the new optimizer state."""
    new = Replacement(modules=[model, *(average for average, _ in followers)])
    for name, change in changes.items():
        layer = layers[name]
        new.factors.append((layer, change.lora_A, change.lora_B))
        new.factors += [(own[name], *moved_average(own[name], change)) for _, own in followers]
        for optimizer in optimizers:
            moved = moved_states(optimizer, layer.lora_A, layer.lora_B, change, optimizer_state)
            new.states += [(optimizer, parameter, state) for parameter, state in moved.items()]
    return new
