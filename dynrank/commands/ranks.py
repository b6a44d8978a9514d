"""The output of ``dynrank ranks``: the layers of a composed run."""

from typing import Any

from omegaconf import DictConfig

from dynrank.driver.check import depends_on_data, final_ranks
from dynrank.layers.base import params_per_rank
from dynrank.layers.finding import own_layers
from dynrank.output.console import empty_table, print_table, shape_of_update
from dynrank.output.slots import slot_line
from dynrank.run.job import build


def print_ranks(config: DictConfig) -> None:
    """Print the LoRA layers of a run with ``config``; the model is built without weights."""
    job = build(config, on_meta=True)
    model: Any = job.module.model
    stages = job.scheduler.driver.stages
    layers, final = own_layers(model), final_ranks(model, stages)
    about = "about " if depends_on_data(stages) else ""
    headings = ("layer", "d_out x d_in", "rank", "final rank", "alpha", "scaling", "parameters", "final parameters")
    table = empty_table("LoRA layers of the composed run", *headings, "rule", texts=["rule"])
    start = end = 0
    for name, layer in layers.items():
        width = params_per_rank(layer)
        start += layer.rank * width
        end += final[name] * width
        table.add_row(
            name,
            shape_of_update(layer.num_products, len(layer.lora_B), layer.lora_A.shape[1]),
            str(layer.rank),
            f"{final[name]} (pinned)" if layer.pinned else f"{about}{final[name]}",
            f"{layer.alpha:g}",
            f"{layer.scaling:g}",
            f"{layer.rank * width:,}",
            f"{final[name] * width:,}",
            layer.rule or "lora.rank",
        )
    table.add_section()
    table.add_row(f"{len(layers)} layers", *[""] * 5, f"{start:,}", f"{end:,}", "")
    table.caption = f"at the end, {about}{slot_line(final)}"
    print_table(table)
