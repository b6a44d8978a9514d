"""Ranks, energy and spectra for Lightning's loggers: numbers for all, histograms and a picture for TensorBoard."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib.util import find_spec

import torch
from lightning.pytorch.loggers import Logger, TensorBoardLogger

from dynrank.driver.attempt import RankEvent
from dynrank.layers.ranked import RankedLayer
from dynrank.linalg import effective_rank


def log_ranks(loggers: Iterable[Logger], layers: Mapping[str, RankedLayer], step: int) -> None:
    """``rank/mean``, ``rank/max``, and ``rank/layer/NAME`` of each layer."""
    ranks = {name: layer.rank for name, layer in layers.items()}
    if not ranks:
        return
    values = {"rank/mean": sum(ranks.values()) / len(ranks), "rank/max": float(max(ranks.values()))}
    values |= {f"rank/layer/{name}": float(rank) for name, rank in ranks.items()}
    for logger in loggers:
        logger.log_metrics(values, step=step)


def log_prediction(loggers: Iterable[Logger], event: RankEvent) -> None:
    """What the change is expected to cost, and the spectra that this comes from.

    ``energy_kept/NAME`` and ``effective_rank/NAME`` of each layer that changes. TensorBoard also gets
    ``spectrum/NAME``, a histogram of its singular values before the change, and where matplotlib is installed
    ``spectra``, a picture of all of them.
    """
    errors = [layer.predicted_error for layer in event.layers]
    values = {"rank/predicted_error": sum(e * e for e in errors) ** 0.5, "rank/predicted_error_max": max(errors)}
    for layer in event.layers:
        values[f"energy_kept/{layer.layer}"] = layer.energy_kept
        values[f"effective_rank/{layer.layer}"] = effective_rank(torch.tensor(layer.singular_values))
    for logger in loggers:
        logger.log_metrics(values, step=event.step)
        if isinstance(logger, TensorBoardLogger):
            _log_spectra(logger, event)


def _log_spectra(logger: TensorBoardLogger, event: RankEvent) -> None:
    for layer in event.layers:
        spectrum = torch.tensor(layer.singular_values)
        logger.experiment.add_histogram(f"spectrum/{layer.layer}", spectrum, event.step)
    if find_spec("matplotlib") is not None:  # an extra of its own
        from dynrank.output.plots import spectra_figure

        spectra = {layer.layer: layer.singular_values for layer in event.layers}
        kept = {layer.layer: layer.rank_after for layer in event.layers}
        figure = spectra_figure(spectra, kept, f"before the change at step {event.step}")
        logger.experiment.add_figure("spectra", figure, event.step, close=False)  # of no pyplot, which would close it
