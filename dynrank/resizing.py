"""The one place where the rank of a layer changes: all layers checked, all changed, then every optimizer's state."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import Optimizer

from dynrank.errors import ConfigurationError
from dynrank.layers.base import LoRALayer
from dynrank.layers.inject import lora_layers
from dynrank.linalg import RankChange, energy_kept, grow_product, truncate_product
from dynrank.optim import change_state, check_optimizer

__all__ = ["LayerReport", "resize"]

METRICS = ("weight",)


@dataclass(frozen=True)
class LayerReport:
    """What a change of rank did to one layer.

    Attributes:
        layer: its name in the model.
        rank_before: rank before the change.
        rank_after: rank after it.
        energy_kept: share of the update's energy (sum of squared singular values) that stays, in [0, 1].
        predicted_error: Frobenius norm of the change of the layer's update, known before it is made.
        singular_values: of the update before the change (scaling included), descending, ``rank_before`` numbers.
        parameters_saved: trainable numbers that went away (negative for growth).
    """

    layer: str
    rank_before: int
    rank_after: int
    energy_kept: float
    predicted_error: float
    singular_values: tuple[float, ...]
    parameters_saved: int


@torch.no_grad()
def resize(
    model: nn.Module,
    target: int | Mapping[str, int],
    *,
    optimizers: Iterable[Optimizer] = (),
    metric: str = "weight",
    optimizer_state: str = "transport",
) -> list[LayerReport]:
    """Change the rank of LoRA layers in place, and carry the optimizers' state; shrinks or grows.

    Shrinking is the best approximation in ``metric`` (the ``weight`` metric: plain SVD of B @ A); growing leaves the
    function as it is. Scaling stays. The Parameter objects stay too, so optimizers, their param groups, schedulers and
    hooks go on working; gradients are dropped, so call it when none are pending. All or nothing: every layer and
    optimizer is checked before the first is changed.

    Args:
        model: a model with LoRA layers.
        target: the new rank of every layer, or {layer name: new rank} for some.
        optimizers: those that hold the layers' parameters; one that isn't given keeps moments of the old shape.
        metric: "weight".
        optimizer_state: "transport" carries the moments, "reset" forgets those of the changed parameters.

    Returns:
        A report per changed layer, in model order; layers that have their target rank already are left alone.

    Raises:
        ConfigurationError: if there are no LoRA layers, a name, rank or metric cannot be used, a factor holds NaN or
            inf (it names the layer), or an optimizer's state cannot be carried.
        RuntimeError: if a layer is merged.
    """
    if metric not in METRICS:
        raise ConfigurationError(f"metric must be one of {METRICS}, got {metric!r}; set schedule.metric")
    layers = dict(lora_layers(model))
    if not layers:
        raise ConfigurationError("the model has no LoRA layers; call dynrank.add_lora first")
    targets = dict(target) if isinstance(target, Mapping) else dict.fromkeys(layers, target)
    check_targets(layers, targets)
    optimizers = [getattr(optimizer, "optimizer", optimizer) for optimizer in optimizers]  # Lightning wraps them
    changed = {name: layers[name] for name in layers if name in targets and targets[name] != layers[name].rank}
    for optimizer in optimizers:
        check_optimizer(
            optimizer, [p for layer in changed.values() for p in (layer.lora_A, layer.lora_B)], optimizer_state
        )

    changes = {name: _change(name, layer, targets[name]) for name, layer in changed.items()}
    reports = [_report(name, changed[name], change) for name, change in changes.items()]
    for name, change in changes.items():
        layer = changed[name]
        layer.set_factors(change.lora_A, change.lora_B)
        for optimizer in optimizers:
            change_state(optimizer, layer.lora_A, change.from_A, change.from_B.mT, 0, optimizer_state)
            change_state(optimizer, layer.lora_B, change.from_B.mT, change.from_A, 1, optimizer_state)
    return reports


def check_targets(layers: Mapping[str, LoRALayer], targets: Mapping[str, int]) -> None:
    """Refuse ranks that no layer can take.

    Raises:
        ConfigurationError: listing every unknown name and every rank outside [1, min(d_in, d_out)].
        RuntimeError: if a layer is merged.
    """
    faults = []
    for name, rank in targets.items():
        if name not in layers:
            faults.append(f"no LoRA layer is named {name!r}")
            continue
        if not isinstance(rank, int) or isinstance(rank, bool):
            faults.append(f"{name!r}: rank must be an int, got {rank!r}")
            continue
        most = min(layers[name].lora_B.shape[0], layers[name].lora_A.shape[1])
        if not 1 <= rank <= most:
            faults.append(f"{name!r}: rank must be between 1 and min(d_in, d_out) = {most}, got {rank}")
        if layers[name].merged:
            raise RuntimeError(f"{name!r} is merged; call unmerge() before changing its rank")
    if faults:
        raise ConfigurationError("ranks cannot be changed (schedule.final_rank or rank_map):\n  " + "\n  ".join(faults))


def _change(name: str, layer: LoRALayer, rank: int) -> RankChange:
    function = truncate_product if rank < layer.rank else grow_product
    try:
        return function(layer.lora_B, layer.lora_A, rank)
    except ValueError as error:
        raise ConfigurationError(
            f"{name!r} cannot change from rank {layer.rank} to {rank}: {error}; nothing has been changed. "
            "Training has diverged: lower optimizer.lr"
        ) from error


def _report(name: str, layer: LoRALayer, change: RankChange) -> LayerReport:
    after, values = change.lora_A.shape[0], change.singular_values * layer.scaling
    return LayerReport(
        layer=name,
        rank_before=layer.rank,
        rank_after=after,
        energy_kept=energy_kept(values, after),
        predicted_error=float(change.dropped.norm() * layer.scaling),
        singular_values=tuple(values.tolist()),
        parameters_saved=layer.lora_A.numel() + layer.lora_B.numel() - change.lora_A.numel() - change.lora_B.numel(),
    )
