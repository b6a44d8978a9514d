"""What a finished run says of itself: summary.json, plots, and the lines at its end."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from dynrank.callbacks import RankEvent, RunMeter
from dynrank.layers.finding import adapter_parameters, lora_layers
from dynrank.linalg import singular_values
from dynrank.models.sizes import storage_bytes
from dynrank.output.console import span
from dynrank.rank_map import RankRule, dump_rank_map

FINAL = "final/"  # before the names of what a test measures of other data than the test's


def summarise(
    model: nn.Module,
    history: Sequence[RankEvent],
    metrics: Mapping[str, float],
    meter: RunMeter,
    held: Mapping[str, int],
    seconds: float,
) -> dict[str, Any]:
    """The contents of summary.json.

    Args:
        model: as it is exported.
        history: changes of rank.
        metrics: of the test; those that begin with ``final/`` are of training and validation data, at the end.
        meter: of the training; tokens per second are those of its training batches.
        held: see :func:`held_bytes`.
        seconds: of the whole run.
    """
    layers = dict(lora_layers(model))
    final = {name.removeprefix(FINAL): float(value) for name, value in metrics.items() if name.startswith(FINAL)}
    both = final.keys() >= {"train/loss", "val/loss"}
    return {
        "test": {name: float(value) for name, value in metrics.items() if not name.startswith(FINAL)},
        "final": final,
        "gap": final["val/loss"] - final["train/loss"] if both else None,
        "final_ranks": {name: layer.rank for name, layer in layers.items()},
        "changes": [{"step": event.step, "reason": event.reason, "undone": event.undone} for event in history],
        "parameters": {
            "adapter": sum(layer.lora_A.numel() + layer.lora_B.numel() for layer in layers.values()),
            "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "total": sum(p.numel() for p in model.parameters()),
        },
        "bytes": dict(held),
        "seconds": seconds,
        "step_seconds": meter.step_seconds,
        "tokens_per_second": meter.tokens_per_second,
        "peak_memory_bytes": meter.peak_memory_bytes,
        "phases": [
            {**asdict(phase), "tokens_per_second": phase.tokens_per_second}
            for phase in meter.phases
            if phase.train_seconds
        ],
    }


def held_bytes(model: nn.Module, optimizers: Iterable[Optimizer]) -> dict[str, int]:
    """Bytes of the tensors that training needs beside the frozen model, at the ranks of now.

    Returns:
        ``adapter``, the factors of all LoRA layers; ``gradients``, as many as all trained parameters have, those of a
        head included; ``optimizer``, its state.
    """
    factors = adapter_parameters(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    state = [value for optimizer in optimizers for value in tree_leaves(list(optimizer.state.values()))]
    return {
        "adapter": sum(factor.nbytes for factor in factors),
        "gradients": sum(parameter.nbytes for parameter in trained),
        "optimizer": storage_bytes(value for value in state if isinstance(value, Tensor)),
    }


def final_rank_map(model: nn.Module, rslora: bool) -> str:
    """The text of an override file that starts a run at the ranks and scalings that ``model`` has now.

    Args:
        model: with LoRA layers.
        rslora: whether that run's scaling starts at alpha / sqrt(rank).
    """
    rules = {
        name: RankRule(layer.rank, alpha=layer.scaling * (layer.rank**0.5 if rslora else layer.rank))
        for name, layer in lora_layers(model)
    }
    return dump_rank_map(rules)


def draw(model: nn.Module, history: Sequence[RankEvent], ranks_at_start: Mapping[str, int], folder: Path) -> None:
    """Write the run's pictures to ``folder / "plots"``."""
    from dynrank.output.plots import plot_loss, plot_quality, plot_ranks, plot_spectra, quality_metrics  # an extra

    plots = folder / "plots"
    plots.mkdir(exist_ok=True)
    layers = dict(lora_layers(model))
    ranks = {name: layer.rank for name, layer in layers.items()}
    made = [event for event in history if not event.undone]
    changes = {e.step: f"rank {_ranks(e.layers, 'rank_before')} → {_ranks(e.layers, 'rank_after')}" for e in made}
    plot_loss(folder / "metrics.csv", changes, plots / "loss.png")
    if quality_metrics(folder / "metrics.csv"):
        plot_quality(folder / "metrics.csv", changes, plots / "quality.png")
    plot_ranks(ranks_at_start, ranks, plots / "ranks.png")
    if made:
        spectra = {report.layer: report.singular_values for report in made[0].layers}
        kept = {report.layer: report.rank_after for report in made[0].layers}
        plot_spectra(spectra, kept, f"before the change at step {made[0].step}", plots / "spectra.png")
    else:
        spectra = {n: tuple((singular_values(la.lora_B, la.lora_A) * la.scaling).tolist()) for n, la in layers.items()}
        plot_spectra(spectra, ranks, "at the end", plots / "spectra.png")


def _ranks(layers: Any, field: str) -> str:
    return span({getattr(layer, field) for layer in layers})


def print_summary(summary: Mapping[str, Any], folder: Path, report: Path | None = None) -> None:
    """Print what one wants to know at the end of a run in ``folder``; ``report`` is its report.html, if it has one."""
    rows = {name: f"{value:.4f}" for name, value in summary["test"].items()}
    if summary["gap"] is not None:
        rows["gap"] = "{:.4f} = validation {val/loss:.4f} - training {train/loss:.4f} at the end".format(
            summary["gap"], **summary["final"]
        )
    rows["final rank"] = ", ".join(str(rank) for rank in sorted(set(summary["final_ranks"].values())))
    rows["parameters"] = "{adapter:,} in the adapter, {trainable:,} trained".format(**summary["parameters"])
    rows["time"] = "{seconds:.0f} s, {tokens_per_second:.0f} tokens/s in training".format(**summary)
    rows["peak memory"] = f"{summary['peak_memory_bytes'] / 2**20:.0f} MiB"
    rows["files"] = str(folder)
    if report is not None:
        rows["report"] = str(report)
    for name, text in rows.items():
        print(f"{name:<16} {text}")
