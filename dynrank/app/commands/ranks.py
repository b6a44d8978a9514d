"""``dynrank ranks``: every LoRA layer of a run before it is made, and the ranks with which it will end."""

from typing import Any

from omegaconf import DictConfig

from dynrank.app.runs.job import build
from dynrank.driver.notices import pool_at_end, rank_spans
from dynrank.layers.finding import own_layers
from dynrank.output.console import empty_table, print_table, shape_of_update, span
from dynrank.output.ranks import ranks
from dynrank.output.slots import slot_line


def print_ranks(config: DictConfig) -> None:
    """Print the LoRA layers of a run with ``config``; the model is built without weights."""
    job = build(config, on_meta=True)
    model: Any = job.module.model
    stages = job.scheduler.driver.stages
    own = own_layers(model)
    ends = rank_spans(model, stages)
    headings = ("layer", "d_out x d_in", "rank", "final rank", "alpha", "scaling", "parameters", "rule")
    table = empty_table("LoRA layers of the composed run", *headings, texts=["rule"])
    layers = ranks(model)
    for layer in layers:
        low, high = ends[layer.layer]
        bounds = own[layer.layer].bounds
        table.add_row(
            layer.layer,
            shape_of_update(layer.experts, layer.d_out, layer.d_in),
            str(layer.rank),
            f"{span((low, high))} ({bounds})" if low == high and str(bounds) else span((low, high)),
            f"{layer.alpha:g}",
            f"{layer.scaling:g}",
            f"{layer.parameters:,}",
            own[layer.layer].rule or "lora.rank",
        )
    table.add_section()
    table.add_row(f"{len(layers)} layers", *[""] * 5, f"{layers.parameters:,}", "")
    pool = pool_at_end(model, stages)
    if all(low == high for low, high in ends.values()):
        end = sum(layer.parameters // layer.rank * ends[layer.layer][0] for layer in layers)
        said = f"{end:,} parameters, {slot_line({name: low for name, (low, _) in ends.items()})}"
    # The data decide which layers get more than others, so only bounds and the sum are known.
    elif pool is not None:
        said = f"at most {pool:,} parameters; the run decides each rank"
    else:
        said = "the run decides each rank"
    table.caption = f"at the end, {said}"
    print_table(table)
