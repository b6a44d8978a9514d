"""What a change of ranks will do to each layer, known before it is made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dynrank.change.gates import Gates
from dynrank.change.greedy import LossChange
from dynrank.errors import ConfigurationError, diverged
from dynrank.layers.finding import lora_layers
from dynrank.layers.ranked import RankedLayer, max_rank, width_of
from dynrank.linalg import energy_kept, pooled, singular_values
from dynrank.schedules import How

__all__ = ["LayerReport", "predict", "spectra"]


@dataclass(frozen=True)
class LayerReport:
    """What a change of rank does to one layer.

    Attributes:
        layer: its name in the model.
        rank_before: rank before the change.
        rank_after: rank after it.
        energy_kept: share of the energy (sum of squared singular values) that stays, in [0, 1].
        predicted_error: norm of the dropped singular values: the Frobenius norm of the update's change.
        singular_values: of the update before the change (scaling included), descending.
        width: d_out + d_in (times the experts), the parameters of one direction.
        loss: the layer's part in the estimated change of the loss; None where no gates were watched.
    """

    layer: str
    rank_before: int
    rank_after: int
    energy_kept: float
    predicted_error: float
    singular_values: tuple[float, ...]
    width: int
    loss: LossChange | None = None

    @property
    def parameters_saved(self) -> int:
        """Trainable numbers that go away (negative for growth)."""
        return (self.rank_before - self.rank_after) * self.width


def predict(
    model: nn.Module, target: int | Mapping[str, int], *, how: How | None = None, gates: Gates | None = None
) -> list[LayerReport]:
    """The reports that :func:`dynrank.resize` would return, without changing anything; same arguments, same errors."""
    layers, targets = changing_layers(model, target, how or How(), gates)
    kept = kept_directions(layers, targets, gates)
    values = spectra({name: layers[name] for name in targets})
    return reports_of(layers, targets, kept, values, gates)


@torch.no_grad()
def spectra(layers: Mapping[str, RankedLayer], gates: Gates | None = None) -> dict[str, Tensor]:
    """What each layer's directions are worth, (rank,) float64, descending.

    Singular values of its update, scaling included; with ``gates``, what they are worth to the loss (see
    :meth:`dynrank.change.greedy.Quadratic.values`).

    Raises:
        ConfigurationError: if a layer's factors are not finite (it names the layer), or no pass has reached its gates.
    """
    if gates is not None:
        values = gates.values()
        return {name: values[name] for name in layers}
    found = {}
    for name, layer in layers.items():
        try:
            found[name] = pooled([singular_values(b, a) for b, a in layer.products()]) * layer.scaling
        except ValueError as error:
            raise diverged(name, error) from error
    return found


def kept_directions(
    layers: Mapping[str, RankedLayer], targets: Mapping[str, int], gates: Gates | None
) -> dict[str, Tensor]:
    """{layer: (rank,) which of its singular directions stay, ascending} of ``targets``; all of them where it grows."""
    shrunk = {name: rank for name, rank in targets.items() if rank < layers[name].rank}
    chosen = gates.kept(shrunk) if gates is not None and shrunk else {}
    return {name: chosen.get(name, torch.arange(min(rank, layers[name].rank))) for name, rank in targets.items()}


def report_of(
    name: str, rank: int, values: Tensor, width: int, kept: Tensor | None = None, loss: LossChange | None = None
) -> LayerReport:
    """The report of a change to ``rank``, of a layer with these singular values (scaling included), one per direction.

    ``kept`` are the directions that stay, the first ones when None; ``width`` and ``loss`` as in :class:`LayerReport`.
    """
    stays = (torch.arange(min(rank, len(values))) if kept is None else kept).to(values.device)
    gone = values.index_fill(0, stays, 0.0)
    return LayerReport(
        layer=name,
        rank_before=len(values),
        rank_after=rank,
        energy_kept=energy_kept(torch.cat([values[stays], gone]), len(stays)),
        predicted_error=float(gone.norm()),
        singular_values=tuple(values.tolist()),
        width=width,
        loss=loss,
    )


def reports_of(
    layers: Mapping[str, RankedLayer],
    targets: Mapping[str, int],
    kept: Mapping[str, Tensor],
    values: Mapping[str, Tensor],
    gates: Gates | None,
) -> list[LayerReport]:
    """The report of each changing layer; with ``gates``, of what the loss is estimated to do, too."""
    changes = gates.change(kept) if gates is not None else {}
    return [
        report_of(name, rank, values[name], width_of(layers[name]), kept[name], changes.get(name))
        for name, rank in targets.items()
    ]


def changing_layers(
    model: nn.Module, target: int | Mapping[str, int], how: How, gates: Gates | None
) -> tuple[dict[str, RankedLayer], dict[str, int]]:
    """(all LoRA layers by name, {name: new rank} of those whose rank changes), both in model order.

    Raises:
        ConfigurationError: if there are no LoRA layers, listing every unknown name and every rank outside
            [1, highest] (see :func:`dynrank.layers.ranked.max_rank`), or if the metric needs gates and there are none.
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
    if shrinks and how.metric == "gates" and gates is None:
        raise ConfigurationError(
            "metric=gates needs what the loss says of each direction: watch training with dynrank.change.gates.Gates "
            "over some steps and pass gates=, or set schedule.metric=weight"
        )
    return layers, changing
