"""The output of ``dynrank ranks``: the layers of a composed run."""

from typing import Any

from omegaconf import DictConfig

from dynrank.driver.bounds import final_parameters, final_ranks
from dynrank.layers.finding import own_layers
from dynrank.layers.ranked import width_of
from dynrank.output.console import empty_table, print_table, shape_of_update, span
from dynrank.output.ranks import slot_line
from dynrank.run.job import build


def print_ranks(config: DictConfig) -> None:
    """Print the LoRA layers of a run with ``config``; the model is built without weights."""
    job = build(config, on_meta=True)
    model: Any = job.module.model
    layers, final = own_layers(model), final_ranks(model, job.scheduler.driver.stages)
    headings = ("layer", "d_out x d_in", "rank", "final rank", "alpha", "scaling", "parameters", "final parameters")
    table = empty_table("LoRA layers of the composed run", *headings, "rule", texts=["rule"])
    start = 0
    for name, layer in layers.items():
        width = width_of(layer)
        start += layer.rank * width
        table.add_row(
            name,
            shape_of_update(layer.experts, len(layer.lora_B), layer.lora_A.shape[1]),
            str(layer.rank),
            span(final[name]) + (" (pinned)" if layer.pinned else ""),
            f"{layer.alpha:g}",
            f"{layer.scaling:g}",
            f"{layer.rank * width:,}",
            span([rank * width for rank in final[name]]),
            layer.rule or "lora.rank",
        )
    table.add_section()
    end = span(final_parameters(model, job.scheduler.driver.stages))
    table.add_row(f"{len(layers)} layers", *[""] * 5, f"{start:,}", end, "")
    highest = {name: max(ends) for name, ends in final.items()}
    table.caption = (
        f"at the end{' at most' if any(low < high for low, high in final.values()) else ''}: {slot_line(highest)}"
    )
    print_table(table)
