"""The output of ``dynrank plan``."""

import torch
from omegaconf import DictConfig
from rich.table import Table

from dynrank.callbacks import peak_memory_bytes
from dynrank.output.console import empty_table, print_table, span
from dynrank.output.ranks import layer_kinds
from dynrank.planner.plan import Plan, make_plan
from dynrank.run.job import lacks_data

PARTS = ("weights", "adapter", "optimizer", "gradients", "activations", "step")


def show_plan(config: DictConfig) -> None:
    """Print the plan of ``config``."""
    # This process has imported the same libraries as a run. They take no memory of a GPU.
    libraries = 0 if torch.cuda.is_available() else peak_memory_bytes()
    plan = make_plan(config)
    kinds = dict.fromkeys(layer_kinds(plan.layers).values())
    print(f"model            {plan.model}, {plan.parameters:,} parameters, base in {plan.weights}")
    print(f"LoRA             {len(plan.layers)} layers: {', '.join(kinds)}")
    if plan.head_parameters:
        unknown = ", a head of two classes: data.train is not set" if config.base is None and lacks_data(config) else ""
        print(f"trained whole    {plan.head_parameters:,} parameters{unknown}")
    print(f"batch            {plan.batch[0]} x {plan.batch[1]} tokens; optimizer {plan.optimizer}")
    print_table(_table(plan, libraries))
    print("total            weights + adapter + optimizer + step; step is the peak of forward and backward")
    if plan.folded:
        print(f"experts          by dynrank's layers; PEFT's save {_mebibytes(plan.folded)} MiB more for backward:")
        print("                 all weights with their updates (unless model.gradient_checkpointing=true)")
    if libraries:
        print(f"process          total + {_mebibytes(libraries)} MiB of Python and libraries, as here; compare with")
        print("                 peak_memory_bytes in summary.json, which includes data and the allocator's reserve")
    if plan.budget is not None:
        fit = [need.rank for need in plan.needs if need.total <= plan.budget]
        lacking = plan.needs[0].total - plan.budget
        said = f"none of these fits; rank {plan.needs[0].rank} lacks {_mebibytes(lacking)} MiB"
        if fit:
            said = f"rank {max(fit)} is the highest of these that fits"
        print(f"budget           {_mebibytes(plan.budget)} MiB: {said}")


def _table(plan: Plan, libraries: int) -> Table:
    more = (["process"] if libraries else []) + ([] if plan.budget is None else ["fits"])
    table = empty_table("MiB by rank", "rank", "LoRA parameters", "of model", *PARTS, "total", *more)
    for need in plan.needs:
        # Layers of a rank map may have other ranks.
        of_others = "" if need.ranks == (need.rank, need.rank) else f" ({span(need.ranks)})"
        cells = [f"{need.rank}{of_others}", f"{need.parameters:,}", f"{need.parameters / plan.parameters:.2%}"]
        cells += [_mebibytes(getattr(need, part)) for part in (*PARTS, "total")]
        if libraries:
            cells.append(_mebibytes(need.total + libraries))
        if plan.budget is not None:
            cells.append("yes" if need.total <= plan.budget else "no")
        table.add_row(*cells)
    return table


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:,.1f}"
