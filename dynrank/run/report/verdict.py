"""The results of a finished run in sentences: quality around each change, bytes, gap, other runs, next commands."""

import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from dynrank.errors import ConfigurationError
from dynrank.output.console import span
from dynrank.run.command import command
from dynrank.run.report.record import Change, RunRecord
from dynrank.run.summary import Summary, read_summary

# WORSE: largest share that a cheap change adds to the loss. FAR: smallest wide gap, as a share of the validation loss.
LOSS, WORSE, FAR = "val/loss", 0.01, 0.3


def read_rival(folder: Path) -> Summary:
    """The summary of another run, to compare with."""
    try:
        return read_summary(folder)
    except OSError as error:
        raise ConfigurationError(
            f"--against must be the folder of a finished run, got {str(folder)!r}: {error}"
        ) from None


def run_name(folder: Path) -> str:
    """The last two parts of the path: the date and the time for a run without a name."""
    return "/".join(folder.resolve().parts[-2:])


def conclusions(run: RunRecord, rivals: Mapping[str, Summary]) -> Iterator[str]:
    """Sentences about the results of the run, the most important first."""
    summary = run.summary
    if summary.test:
        tested = ", ".join(f"{name} {value:.4g}" for name, value in summary.test.items())
        yield f"{tested}, after {run.last_step:,} steps; the run took {summary.seconds:,.0f} s."
    for change in run.made[:4]:
        found = around(run, change, LOSS)
        if found.before is not None and found.after is not None:
            end = run.metrics[LOSS][1][-1]
            yield f"Rank {change.ranks} at step {change.step:,}: {LOSS} {found}, {end:.4g} at the end."
    start, now = (
        sum(ranks[i][1] * sum(run.layers[name].shape) for name, ranks in run.ranks().items()) for i in (0, -1)
    )
    held = summary.bytes.get("adapter", 4 * summary.parameters["adapter"])
    yield f"The adapter takes {held / 1e6:.2f} MB" + (
        f", {now / start:.0%} of what it began with." if now != start else "."
    )
    if summary.gap is not None:
        yield (
            f"The gap is {summary.gap:.3g}: validation loss {summary.final[LOSS]:.4g}, training loss "
            f"{summary.final['train/loss']:.4g}, both of the final weights and measured alike."
        )
    for name, rival in rivals.items():
        differences = [f"{key} {summary.test[key] - rival.test[key]:+.4g}" for key in summary.test if key in rival.test]
        times = summary.parameters["adapter"] / rival.parameters["adapter"]
        yield f"Against {name}: {', '.join([*differences, f'{times:.3g} times its adapter parameters'])}."


def compared(runs: Iterable[Summary]) -> dict[str, list[str]]:
    """{what is compared: its value in each of ``runs``}; "–" means not measured."""
    rows: list[dict[str, str]] = [
        {name: f"{value:.4g}" for name, value in run.test.items()}
        | ({"gap": f"{run.gap:.3g}"} if run.gap is not None else {})
        | {"adapter parameters": f"{run.parameters['adapter']:,}", "final rank": span(run.final_ranks.values())}
        | {"seconds": f"{run.seconds:,.0f}", "tokens per second": f"{run.tokens_per_second:,.0f}"}
        for run in runs
    ]
    return {name: [row.get(name, "–") for row in rows] for name in dict.fromkeys(name for row in rows for name in row)}


def kinds_of_loss(run: RunRecord) -> str:
    """Why the training loss and the validation loss in the picture cannot be compared."""
    config = run.settings
    smoothing, dropout = config.get("task.label_smoothing"), config.get("lora.dropout")
    causes = [f"label smoothing ({smoothing})"] if smoothing else []
    causes += [f"dropout of the adapter ({dropout})"] if dropout else []
    return (
        f"Training loss is of one batch before its step, with {' and '.join([*causes, 'the dropout of the model'])}; "
        "validation has none of that. The gap at the top is measured alike for both."
    )


@dataclass(frozen=True)
class Around:
    """A metric by the validations next to a change.

    Attributes:
        before: value of the last validation before the change; None: there was none.
        after: value of the first validation after the change.
        earlier: optimizer steps from the validation before to the change.
        later: optimizer steps from the change to the validation after; 0: it validated the changed weights directly.
    """

    before: float | None
    after: float | None
    earlier: int = 0
    later: int = 0

    @property
    def cost(self) -> float | None:
        """Share that the change added to the metric; None if there was training between the two validations."""
        if self.before and self.after is not None and not self.earlier and not self.later:
            return self.after / self.before - 1
        return None

    def __str__(self) -> str:
        before, after = (f"{value:.4g}" if value is not None else "–" for value in (self.before, self.after))
        if self.cost is not None:
            return f"{before} before, {after} right after it ({self.cost:+.1%})"
        return f"{before} {_steps(self.earlier, 'before')}, {after} {_steps(self.later, 'later')}"


def _steps(count: int, where: str) -> str:
    return f"{count} step{'s' if count > 1 else ''} {where}" if count else where


def around(run: RunRecord, change: Change, metric: str) -> Around:
    """``metric`` before and after a change; a validation after n steps is in row n - 1.

    If validations check a change (``max_regression``), several have its step: the first was before the change, the
    last after it.
    """
    rows = list(zip(*run.metrics.get(metric, ([], [])), strict=True))
    at = [value for step, value in rows if step == change.step]
    before = [(change.step - 1 - step, value) for step, value in rows if step < change.step][-1:]
    after = [(step + 1 - change.step, value) for step, value in rows if step >= change.step][:1]
    if len(at) > 1 or (at and _checks(run.settings)):
        before, after = [(0, at[0])] if len(at) > 1 else before, [(0, at[-1])]
    (earlier, value_before), (later, value_after) = (*before, (0, None))[0], (*after, (0, None))[0]
    return Around(value_before, value_after, earlier, later)


def _checks(settings: object) -> bool:
    """Whether ``max_regression`` is set anywhere in a configuration."""
    if isinstance(settings, Mapping):
        return settings.get("max_regression") is not None or any(map(_checks, settings.values()))
    return isinstance(settings, list) and any(map(_checks, settings))


def next_commands(run: RunRecord) -> Iterator[tuple[str, str]]:
    """(reason, command) for each run that is worth trying next."""
    config, ranks = run.settings, sorted(set(run.summary.final_ranks.values()))
    middle = round(sum(run.summary.final_ranks.values()) / len(run.summary.final_ranks))
    if run.overrides is not None:

        def train(*changes: str, without: tuple[str, ...] = ()) -> str:
            return str(command(run.folder, *changes, without=("ckpt_path", *without)))

        if run.made:
            yield (
                "compare with a run that has the final rank from the start",
                train(f"lora.rank={middle}", "schedule=fixed", without=("schedule",)),
            )
            costs = [around(run, change, LOSS).cost for change in run.made]
            worst, known = max((cost for cost in costs if cost is not None), default=0.0), None not in costs
            if worst > WORSE or not known:
                why = (
                    "undo a change that costs this much"
                    if known
                    else "measure the cost of each change, and undo a high one"
                )
                yield why, train(f"schedule.how.max_regression={WORSE}")
            if worst <= WORSE and "schedule.final_rank" in config and ranks[0] > 1:
                why = "the change cost little: try a lower rank" if known else "try a smaller adapter"
                yield why, train(f"schedule.final_rank={max(1, middle // 2)}")
        if len(ranks) == 1:
            yield (
                "give all layers one budget, not one rank",
                train(f"lora.rank={2 * middle}", "schedule=early_budget", without=("schedule",)),
            )
        gap, loss = run.summary.gap, run.summary.final.get(LOSS)
        if gap is not None and loss and gap > FAR * loss and not config.get("lora.dropout"):
            yield "the gap is wide: regularise", train("lora.dropout=0.1")
        yield "measure how much runs differ by chance", train("--multirun", "seed=1,2,3")
    yield "use the adapter", shlex.join(["dynrank", "predict", str(run.folder / "adapter"), "a text"])
    yield (
        "compare the run with others on this page",
        shlex.join(["dynrank", "report", str(run.folder), "--against", "RUN"]),
    )
