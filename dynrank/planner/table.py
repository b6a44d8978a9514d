"""What ``dynrank plan`` prints and draws."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig
from rich.table import Table

from dynrank.adapters.inspection import check_plot
from dynrank.errors import ConfigurationError
from dynrank.output.console import span, table_console
from dynrank.planner.plan import Need, Plan, make_plan

__all__ = ["PARTS", "print_plan", "show_plan"]

PARTS = ("weights", "adapter", "optimizer", "gradients", "activations", "step")


def show_plan(config: DictConfig, plot: Path | None) -> None:
    """Print the plan of ``config`` and draw it into ``plot``.

    Raises:
        ConfigurationError: if a value cannot be used, or the picture cannot be written.
    """
    if plot is not None:
        check_plot(plot)
    plan = make_plan(config)
    print_plan(plan)
    if plot is not None:
        draw_plan(plan, plot)
        print(f"plot             {plot}")


def print_plan(plan: Plan) -> None:
    """Print two lines per rank, the second with gradient checkpointing, and what fits the budget."""
    print(f"model            {plan.model}, {plan.parameters:,} parameters, base in {plan.weights}")
    print(f"LoRA             {len(plan.layers)} layers: {', '.join(_kinds(plan.layers))}")
    if plan.head_parameters:
        print(f"trained whole    {plan.head_parameters:,} parameters")
    print(f"batch            {plan.batch[0]} x {plan.batch[1]} tokens; optimizer {plan.optimizer}")
    table = Table(title="MiB by rank")
    for heading in ("rank", "LoRA parameters", "of model", "checkpointing", *PARTS, "total"):
        table.add_column(heading, justify="right", overflow="fold")
    if plan.budget is not None:
        table.add_column("fits", justify="right")
    for number, need in enumerate(plan.needs):
        first = number == 0 or plan.needs[number - 1].rank != need.rank
        if first and number:
            table.add_section()
        share = f"{need.parameters / plan.parameters:.2%}"
        table.add_row(
            *((_rank(need), f"{need.parameters:,}", share) if first else ("", "", "")),
            "yes" if need.checkpointing else "no",
            *(mebibytes(getattr(need, part)) for part in PARTS),
            mebibytes(need.total),
            *(("yes" if need.total <= plan.budget else "no",) if plan.budget is not None else ()),
        )
    table_console().print(table)
    print("total            weights + adapter + optimizer + step, the most that forward and backward hold at once")
    if plan.budget is not None:
        _print_best(plan, plan.budget)


def _print_best(plan: Plan, budget: int) -> None:
    ways = {False: "without gradient checkpointing", True: "with gradient checkpointing"}
    for checkpointing, way in ways.items():
        totals = {need.rank: need.total for need in plan.needs if need.checkpointing == checkpointing}
        best = plan.best(checkpointing=checkpointing)
        if best is not None:
            print(f"budget           {mebibytes(budget)} MiB: rank {best} is the highest of these that fits, {way}")
        elif totals:
            lowest = min(totals)
            lacks = mebibytes(totals[lowest] - budget)
            print(
                f"budget           {mebibytes(budget)} MiB: none of these fits, {way}; rank {lowest} lacks {lacks} MiB"
            )


def draw_plan(plan: Plan, file: Path) -> None:
    """Draw the bytes by rank as stacked bars, with the budget.

    Raises:
        ConfigurationError: if the picture cannot be written.
    """
    from dynrank.output.plots import plot_memory  # matplotlib is an extra

    bars = {
        _rank(need) + ("\nckpt" if need.checkpointing else ""): {
            "weights": need.weights,
            "adapter": need.adapter,
            "optimizer": need.optimizer,
            "activations": need.activations,
            "rest of the step": need.step - need.activations,
        }
        for need in plan.needs
    }
    title = f"{plan.model}, base in {plan.weights}\nbatch {plan.batch[0]} x {plan.batch[1]} tokens, {plan.optimizer}"
    try:
        plot_memory(bars, plan.budget, title, file)
    except OSError as error:
        raise ConfigurationError(f"cannot write --plot {str(file)!r}: {error.strerror or error}") from None


def mebibytes(size: int) -> str:
    """``size`` bytes in MiB, to a tenth."""
    return f"{size / 2**20:,.1f}"


def _rank(need: Need) -> str:
    """Of the layers that no rule sets; and of all, where rules set others."""
    return str(need.rank) if need.ranks == (need.rank, need.rank) else f"{need.rank} ({span(need.ranks)})"


def _kinds(layers: Sequence[str]) -> list[str]:
    """What follows the last number in each name, each once."""
    return list(dict.fromkeys(re.split(r"\.\d+\.", layer)[-1] for layer in layers))
