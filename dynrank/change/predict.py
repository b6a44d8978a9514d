"""What a change of ranks will do to each layer, known before it is made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dynrank.change.measuring import Gram, Moments
from dynrank.errors import ConfigurationError, DivergedError
from dynrank.layers.finding import lora_layers
from dynrank.layers.ranked import RankedLayer, max_rank
from dynrank.linalg import energy_kept, singular_values
from dynrank.schedules import How

__all__ = ["LayerReport", "predict", "spectra"]


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
        width: d_out + d_in, the parameters of one direction.
    """

    layer: str
    rank_before: int
    rank_after: int
    energy_kept: float
    predicted_error: float
    singular_values: tuple[float, ...]
    width: int

    @property
    def parameters_saved(self) -> int:
        """Trainable numbers that go away (negative for growth)."""
        return (self.rank_before - self.rank_after) * self.width


def predict(
    model: nn.Module, target: int | Mapping[str, int], *, how: How | None = None, measured: Moments | None = None
) -> list[LayerReport]:
    """The reports that :func:`dynrank.resize` would return, without changing anything; same arguments, same errors."""
    how = how or How()
    layers, targets = changing_layers(model, target, how, measured)
    values = spectra({name: layers[name] for name in targets}, how, measured)
    return [report_of(name, rank, values[name], width_of(layers[name])) for name, rank in targets.items()]


@torch.no_grad()
def spectra(layers: Mapping[str, RankedLayer], how: How, measured: Moments | None) -> dict[str, Tensor]:
    """Singular values of each layer's update in the metric, scaling included, descending, (rank,) float64.

    Raises:
        ConfigurationError: if a factor is not finite (it names the layer), or no statistics of a layer were measured.
    """
    found = {}
    for name, layer in layers.items():
        gram_u, gram_z = grams_of(name, how, measured)
        try:
            values = singular_values(layer.lora_B, layer.lora_A, gram_u=gram_u, gram_z=gram_z)
        except ValueError as error:
            raise unusable(name, layer, layer.rank, error) from error
        found[name] = values * layer.scaling
    return found


def grams_of(name: str, how: How, measured: Moments | None) -> Gram:
    """(G_u, G_z) of a layer for the metric; the factors' own where nothing had to be measured, as in growth."""
    return measured.of(name, how.metric) if measured is not None else (None, None)


def width_of(layer: RankedLayer) -> int:
    """d_out + d_in: the parameters of one direction."""
    return layer.lora_B.shape[0] + layer.lora_A.shape[1]


def report_of(name: str, rank: int, values: Tensor, width: int) -> LayerReport:
    """The report of a change to ``rank``; ``values`` are all singular values, scaling included, one per direction."""
    return LayerReport(
        layer=name,
        rank_before=len(values),
        rank_after=rank,
        energy_kept=energy_kept(values, rank),
        predicted_error=float(values[rank:].norm()),
        singular_values=tuple(values.tolist()),
        width=width,
    )


def changing_layers(
    model: nn.Module, target: int | Mapping[str, int], how: How, measured: Moments | None
) -> tuple[dict[str, RankedLayer], dict[str, int]]:
    """(all LoRA layers by name, {name: new rank} of those whose rank changes), both in model order.

    Raises:
        ConfigurationError: if there are no LoRA layers, listing every unknown name and every rank outside
            [1, highest] (see :func:`dynrank.layers.ranked.max_rank`), or if the metric needs what was not measured.
        RuntimeError: if a layer is merged.
    """
    layers = dict(lora_layers(model))
    if not layers:
        raise ConfigurationError("the model has no LoRA layers; call dynrank.add_lora first")
    targets = dict(target) if isinstance(target, Mapping) else dict.fromkeys(layers, target)
    faults = []
    for name, rank in targets.items():
        if name not in layers:
            faults.append(f"no LoRA layer is named {name!r}")
            continue
        most, why = max_rank(layers[name])
        if not isinstance(rank, int) or isinstance(rank, bool):
            faults.append(f"{name!r}: rank must be an int, got {rank!r}")
        elif not 1 <= rank <= most:
            faults.append(f"{name!r}: rank must be between 1 and {why} = {most}, got {rank}")
        if layers[name].merged:
            raise RuntimeError(f"{name!r} is merged; call unmerge() before changing its rank")
    if faults:
        raise ConfigurationError("ranks cannot be changed (schedule.final_rank or rank_map):\n  " + "\n  ".join(faults))
    changing = {name: targets[name] for name in layers if name in targets and targets[name] != layers[name].rank}
    shrinks = any(rank < layers[name].rank for name, rank in changing.items())
    if shrinks and how.metric != "weight" and measured is None:
        raise ConfigurationError(
            f"metric={how.metric} needs statistics: collect them in dynrank.change.measuring.Moments over some "
            "training steps and pass measured=, or set schedule.metric=weight"
        )
    return layers, changing


def unusable(name: str, layer: RankedLayer, rank: int, error: ValueError) -> DivergedError:
    """The error to raise where the factors or statistics of a layer cannot be computed with."""
    return DivergedError(
        f"{name!r} cannot change from rank {layer.rank} to {rank}: {error}; nothing has been changed. "
        "Training has diverged: lower optimizer.lr"
    )
