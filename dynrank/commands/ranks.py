"""What ``dynrank ranks`` prints of a composed run: its layers, or the PEFT config that starts as it does."""

from __future__ import annotations

from pprint import pformat
from typing import Any

from omegaconf import DictConfig
from rich.table import Table

from dynrank.adapters.config import make_config
from dynrank.adapters.save import target_modules, trained_heads
from dynrank.driver.bounds import final_parameters, final_ranks
from dynrank.layers.finding import own_layers
from dynrank.output.console import span, table_console
from dynrank.run.job import build


def print_ranks(config: DictConfig) -> None:
    """Print the LoRA layers that ``config`` leads to; the model is built from its config, without weights.

    Raises:
        ConfigurationError: as the run itself would.
    """
    job = build(config, on_meta=True)
    model: Any = job.module.model
    layers = own_layers(model)
    final = final_ranks(model, job.scheduler.driver.stages)
    table = Table(title="LoRA layers of the composed run")
    table.add_column("layer", overflow="fold", min_width=20)
    for heading in ("d_out x d_in", "rank", "final rank", "alpha", "scaling", "parameters", "final parameters"):
        table.add_column(heading, justify="right", overflow="fold")
    table.add_column("rule", overflow="fold")
    start = 0
    for name, layer in layers.items():
        (d_out, rank), d_in = layer.lora_B.shape, layer.lora_A.shape[1]
        width = d_out + d_in
        start += rank * width
        pinned = " (pinned)" if layer.pinned else ""
        table.add_row(
            name,
            f"{d_out} x {d_in}",
            str(rank),
            f"{span(final[name])}{pinned}",
            f"{layer.alpha:g}",
            f"{layer.scaling:g}",
            f"{rank * width:,}",
            span([end * width for end in final[name]]),
            layer.rule or "lora.rank",
        )
    table.add_section()
    table.add_row(
        f"{len(layers)} layers",
        "",
        "",
        "",
        "",
        "",
        f"{start:,}",
        span(final_parameters(model, job.scheduler.driver.stages)),
        "",
    )
    table_console().print(table)


def print_peft_config(config: DictConfig) -> None:
    """Print the PEFT LoraConfig that starts where the composed run starts: same layers, ranks and scalings.

    Raises:
        ConfigurationError: as the run itself would.
    """
    model: Any = build(config, on_meta=True).module.model
    layers = own_layers(model)
    settings = make_config(
        {name: (layer.rank, layer.alpha) for name, layer in layers.items()},
        target_modules=target_modules(model, layers),
        modules_to_save=trained_heads(model, layers),
        dropout=config.lora.dropout,
        base="",
    )
    keys = ("r", "lora_alpha", "lora_dropout", "target_modules", "rank_pattern", "alpha_pattern", "modules_to_save")
    arguments = ",\n".join(f"    {key}={pformat(settings[key], sort_dicts=False)}" for key in keys)
    print(f"LoraConfig(\n{arguments},\n)")
