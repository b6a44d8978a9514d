"""The commands that are worth trying after a run."""

import shlex
from collections.abc import Iterator

from dynrank.runs.command import command
from dynrank.runs.report.record import RunRecord


def next_commands(run: RunRecord) -> Iterator[tuple[str, str]]:
    """(reason, command) for each run that is worth trying next, and for uses of this one."""
    if run.overrides is not None:
        for why, changes, without in _variations(run):
            yield why, str(command(run.folder, *changes, without=("ckpt_path", *without)))
    yield "use the adapter", shlex.join(["dynrank", "predict", str(run.folder / "adapter"), "a text"])
    yield (
        "compare the run with others on this page",
        shlex.join(["dynrank", "report", str(run.folder), "--against", "RUN"]),
    )


def _variations(run: RunRecord) -> Iterator[tuple[str, list[str], tuple[str, ...]]]:
    """(reason, overrides to add, groups to leave out) of each variation of the run."""
    ranks = run.summary.final_ranks.values()
    middle = round(sum(ranks) / len(ranks))
    how = run.settings.get("schedule.how")
    if run.made:
        yield (
            "compare with a run that has the final rank from the start",
            [f"lora.rank={middle}", "schedule=fixed"],
            ("schedule",),
        )
        if how and how.get("max_regression") is None:
            yield "measure what a change costs, and undo one that costs much", ["schedule.how.max_regression=0.01"], ()
        if "schedule.final_rank" in run.settings and middle > 1:
            yield "try a smaller adapter", [f"schedule.final_rank={middle // 2}"], ()
    if len({*ranks}) == 1:
        yield (
            "give all layers one budget, not one rank",
            [f"lora.rank={2 * middle}", "schedule=early_budget"],
            ("schedule",),
        )
    if run.summary.gap is not None and not run.settings.get("lora.dropout"):
        yield "regularise, if the gap is wide", ["lora.dropout=0.1"], ()
    yield "measure how much runs differ by chance", ["--multirun", "seed=1,2,3"], ()
