"""The one place where the rank of a layer changes: all layers checked, all changed, then every optimizer's state."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dynrank.change.averages import averaged_layers, move_average
from dynrank.change.measuring import METRICS, Grams
from dynrank.change.optimizer_state import change_state, check_optimizer
from dynrank.distributed.processes import copy_from_first, from_first
from dynrank.errors import ConfigurationError
from dynrank.layers.compiled import forget_compiled
from dynrank.layers.finding import lora_layers
from dynrank.layers.peft_layers import sync_peft_configs
from dynrank.layers.ranked import RankedLayer, max_rank
from dynrank.linalg import RankChange, energy_kept, grow_product, singular_values, truncate_product

__all__ = ["LayerReport", "predict", "resize"]


@dataclass(frozen=True)
class LayerReport:
    """What a change of rank does to one layer.

    Attributes:
        layer: its name in the model.
        rank_before: rank before the change.
        rank_after: rank after it.
        energy_kept: share of the energy (sum of squared singular values, in the metric) that stays, in [0, 1].
        predicted_error: norm of the dropped singular values, known before the change is made: in ``weight`` the
            Frobenius norm of the update's change, in ``output`` the root mean square norm of the output's change, in
            ``loss`` the root of twice the estimated increase of the loss, up to a factor common to all layers.
        singular_values: of the update before the change in the metric (scaling included), descending.
        parameters_saved: trainable numbers that go away (negative for growth).
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
    grams: Grams | None = None,
    gauge: str = "balanced",
    along: Mapping[str, Tensor] | None = None,
    optimizer_state: str = "transport",
    generator: torch.Generator | None = None,
    averages: Iterable[nn.Module] = (),
    collective: bool = False,
) -> list[LayerReport]:
    """Change the rank of LoRA layers in place, and carry the optimizers' state; shrinks or grows.

    Shrinking is the best approximation in ``metric``; growing leaves the function as it is. Scaling stays. The
    Parameter objects stay too, so optimizers, their param groups, schedulers and hooks go on working; gradients are
    dropped, so call it when none are pending. All or nothing: every layer and optimizer is checked before the first is
    changed.

    Args:
        model: a model with LoRA layers, dynrank's or PEFT's.
        target: the new rank of every layer, or {layer name: new rank} for some.
        optimizers: those that hold the layers' parameters; one that isn't given keeps moments of the old shape.
        metric: "weight" (plain SVD of B @ A), "output" or "loss"; the latter two need ``grams``.
        grams: what :class:`dynrank.change.measuring.Grams` collected since the last change.
        gauge: of the new factors, see :func:`dynrank.linalg.truncate_product`.
        along: {layer name: gradient or its sketch, (N, d_in)}, where a growing layer takes its new rows from; random
            rows when None.
        optimizer_state: "transport" carries the moments, "reset" forgets those of the changed parameters.
        generator: source of the random rows of a growth; torch's default generator when None.
        averages: moving averages of the model (torch's AveragedModel, or a copy with the same layers); they move by the
            same maps, see :mod:`dynrank.change.averages`.
        collective: every process of torch's default group makes this call: process 0 computes, and all take its
            factors, maps and optimizer state, so that they stay alike to the bit. DDP has to be wrapped around the
            model anew afterwards.

    Returns:
        A report per changed layer, in model order; layers that have their target rank already are left alone.

    Raises:
        ConfigurationError: if there are no LoRA layers, a name, rank, metric or gauge cannot be used, a factor holds
            NaN or inf (it names the layer), an optimizer's state cannot be carried, or an average has other layers.
        RuntimeError: if a layer is merged.
    """
    layers, targets = _checked(model, target, metric, grams)
    followers = averaged_layers(averages, layers)
    optimizers = [getattr(optimizer, "optimizer", optimizer) for optimizer in optimizers]  # Lightning wraps them
    for optimizer in optimizers:
        check_optimizer(
            optimizer, [p for name in targets for p in (layers[name].lora_A, layers[name].lora_B)], optimizer_state
        )

    def computed(name: str) -> RankChange:
        layer, rank = layers[name], targets[name]
        try:
            if rank < layer.rank:
                gram_u, gram_z = grams.of(name, metric) if grams is not None else (None, None)
                return truncate_product(layer.lora_B, layer.lora_A, rank, gram_u=gram_u, gram_z=gram_z, gauge=gauge)
            row_source = along[name] if along is not None else None
            return grow_product(layer.lora_B, layer.lora_A, rank, along=row_source, generator=generator)
        except ConfigurationError:
            raise
        except ValueError as error:
            raise _unusable(name, layer, rank, error) from error

    changes = {name: _shared(computed, name, layers[name]) if collective else computed(name) for name in targets}
    reports = [_report(name, layers[name], len(c.lora_A), c.singular_values) for name, c in changes.items()]
    for name, change in changes.items():
        layer = layers[name]
        layer.set_factors(change.lora_A, change.lora_B)
        for optimizer in optimizers:
            change_state(optimizer, layer.lora_A, change.from_A, change.from_B.mT, 0, optimizer_state)
            change_state(optimizer, layer.lora_B, change.from_B.mT, change.from_A, 1, optimizer_state)
            if collective:  # the maps are the same everywhere, but not every machine multiplies to the same bits
                for parameter in (layer.lora_A, layer.lora_B):
                    state = optimizer.state.get(parameter, {}).values()
                    copy_from_first(v for v in state if isinstance(v, Tensor) and v.device == parameter.device)
        for _, own in followers:
            move_average(own[name], change)
            if collective:
                copy_from_first((own[name].lora_A, own[name].lora_B))
    for module in (model, *(average for average, _ in followers)):
        sync_peft_configs(module)
    forget_compiled(layers[name] for name in changes)
    return reports


def _shared(compute: Callable[[str], RankChange], name: str, layer: RankedLayer) -> RankChange:
    """Process 0's result, where its layer's factors live."""

    def moved(change: RankChange, device: torch.device) -> RankChange:
        return replace(change, **{key: value.to(device) for key, value in vars(change).items()})

    change = from_first(lambda: moved(compute(name), torch.device("cpu")))
    return moved(change, layer.lora_A.device)


def predict(
    model: nn.Module, target: int | Mapping[str, int], *, metric: str = "weight", grams: Grams | None = None
) -> list[LayerReport]:
    """What :func:`resize` would report, without changing anything; same arguments, same errors."""
    layers, targets = _checked(model, target, metric, grams)
    spectra = layer_spectra({name: layers[name] for name in targets}, metric, grams)
    return [_report(name, layers[name], rank, spectra[name] / layers[name].scaling) for name, rank in targets.items()]


@torch.no_grad()
def layer_spectra(layers: Mapping[str, RankedLayer], metric: str, grams: Grams | None) -> dict[str, Tensor]:
    """Singular values of each layer's update in ``metric``, scaling included, descending, (rank,) float64.

    Raises:
        ConfigurationError: if a factor is not finite (it names the layer), or statistics are missing.
    """
    spectra = {}
    for name, layer in layers.items():
        gram_u, gram_z = grams.of(name, metric) if grams is not None else (None, None)
        try:
            values = singular_values(layer.lora_B, layer.lora_A, gram_u=gram_u, gram_z=gram_z)
        except ValueError as error:
            raise _unusable(name, layer, layer.rank, error) from error
        spectra[name] = values * layer.scaling
    return spectra


class Snapshot:
    """Everything that :func:`resize` may change of model, optimizers and averages, to be put back exactly."""

    @torch.no_grad()
    def __init__(self, model: nn.Module, optimizers: Iterable[Optimizer], averages: Iterable[nn.Module] = ()) -> None:
        self._optimizers = [getattr(optimizer, "optimizer", optimizer) for optimizer in optimizers]
        layers = dict(lora_layers(model))
        followers = averaged_layers(averages, layers)
        self._models, self._layers = [model, *(average for average, _ in followers)], []
        for layer in (*layers.values(), *(layer for _, own in followers for layer in own.values())):
            states = [
                _copy(optimizer.state.get(parameter, {}))
                for optimizer in self._optimizers
                for parameter in (layer.lora_A, layer.lora_B)
            ]
            self._layers.append((layer, layer.lora_A.clone(), layer.lora_B.clone(), states))

    def restore(self) -> None:
        """Put back factors, ranks and optimizer state, bit for bit; as often as is needed."""
        for layer, lora_A, lora_B, states in self._layers:
            layer.set_factors(lora_A.clone(), lora_B.clone())
            saved = iter(states)
            for optimizer in self._optimizers:
                for parameter in (layer.lora_A, layer.lora_B):
                    optimizer.state.pop(parameter, None)
                    state = next(saved)
                    if state:
                        optimizer.state[parameter] = _copy(state)
        for model in self._models:
            sync_peft_configs(model)
        forget_compiled(layer for layer, *_ in self._layers)


def _copy(state: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value.clone() if isinstance(value, Tensor) else value for key, value in state.items()}


def check_targets(layers: Mapping[str, RankedLayer], targets: Mapping[str, int]) -> None:
    """Refuse ranks that no layer can take.

    Raises:
        ConfigurationError: listing every unknown name and every rank outside [1, highest] (see
            :func:`dynrank.layers.ranked.max_rank`).
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
        most, why = max_rank(layers[name])
        if not 1 <= rank <= most:
            faults.append(f"{name!r}: rank must be between 1 and {why} = {most}, got {rank}")
        if layers[name].merged:
            raise RuntimeError(f"{name!r} is merged; call unmerge() before changing its rank")
    if faults:
        raise ConfigurationError("ranks cannot be changed (schedule.final_rank or rank_map):\n  " + "\n  ".join(faults))


def _checked(
    model: nn.Module, target: int | Mapping[str, int], metric: str, grams: Grams | None
) -> tuple[dict[str, RankedLayer], dict[str, int]]:
    """(all layers by name, {name: new rank} of those that change), after every check that needs no arithmetic."""
    if metric not in METRICS:
        raise ConfigurationError(f"metric must be one of {METRICS}, got {metric!r}; set schedule.metric")
    if metric != "weight" and grams is None:
        raise ConfigurationError(
            f"metric={metric} needs statistics: collect them with dynrank.change.measuring.Grams over some training "
            "steps and pass grams=, or set schedule.metric=weight"
        )
    layers = dict(lora_layers(model))
    if not layers:
        raise ConfigurationError("the model has no LoRA layers; call dynrank.add_lora first")
    targets = dict(target) if isinstance(target, Mapping) else dict.fromkeys(layers, target)
    check_targets(layers, targets)
    return layers, {n: targets[n] for n in layers if n in targets and targets[n] != layers[n].rank}


def _unusable(name: str, layer: RankedLayer, rank: int, error: ValueError) -> ConfigurationError:
    return ConfigurationError(
        f"{name!r} cannot change from rank {layer.rank} to {rank}: {error}; nothing has been changed. "
        "Training has diverged: lower optimizer.lr"
    )


def _report(name: str, layer: RankedLayer, rank: int, values: Tensor) -> LayerReport:
    """Report of a change to ``rank``; ``values`` are without the scaling."""
    values = values * layer.scaling
    width = layer.lora_B.shape[0] + layer.lora_A.shape[1]
    return LayerReport(
        layer=name,
        rank_before=layer.rank,
        rank_after=rank,
        energy_kept=energy_kept(values, rank),
        predicted_error=float(values[rank:].norm()),
        singular_values=tuple(values.tolist()),
        parameters_saved=(layer.rank - rank) * width,
    )
