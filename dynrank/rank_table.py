"""The table that ``dynrank ranks`` prints."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from dynrank.job import build
from dynrank.layers.inject import lora_layers


def print_ranks(config: DictConfig) -> None:
    """Print the LoRA layers that ``config`` leads to; the model is built from its config, without weights.

    Raises:
        ConfigurationError: as the run itself would.
    """
    job = build(config, on_meta=True)
    model: Any = job.module.model
    layers = dict(lora_layers(model))
    final = job.scheduler.final_ranks(model)
    table = Table(title="LoRA layers of the composed run")
    table.add_column("layer", overflow="fold", min_width=20)
    for heading in ("d_out x d_in", "rank", "final rank", "alpha", "scaling", "parameters", "final parameters"):
        table.add_column(heading, justify="right", overflow="fold")
    table.add_column("rule", overflow="fold")
    start = low = high = 0
    for name, layer in layers.items():
        (d_out, rank), d_in = layer.lora_B.shape, layer.lora_A.shape[1]
        width = d_out + d_in
        lowest, highest = final[name]
        start, low, high = start + rank * width, low + lowest * width, high + highest * width
        pinned = " (pinned)" if layer.pinned else ""
        table.add_row(
            name,
            f"{d_out} x {d_in}",
            str(rank),
            f"{_span(lowest, highest)}{pinned}",
            f"{layer.alpha:g}",
            f"{layer.scaling:g}",
            f"{rank * width:,}",
            _span(lowest * width, highest * width),
            layer.rule or "lora.rank",
        )
    table.add_section()
    table.add_row(f"{len(layers)} layers", "", "", "", "", "", f"{start:,}", _span(low, high), "")
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)  # a file or a pipe has room for whole names
    console.print(table)


def _span(low: int, high: int) -> str:
    """One number, or two where the data will decide."""
    return f"{low:,}" if low == high else f"{low:,}-{high:,}"
