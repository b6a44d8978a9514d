"""What a finished run came to, in sentences: quality around each change, bytes, gap, other runs, what to try next."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from dynrank.errors import ConfigurationError
from dynrank.output.console import span
from dynrank.run.report.record import Change, RunRecord
from dynrank.run.summary import Summary, read_summary

__all__ = [
    "around",
    "compared",
    "conclusions",
    "kinds_of_loss",
    "next_commands",
    "read_rival",
    "run_name",
    "warnings",
]

LOSS, BUSY, WORSE, FAR = "val/loss", 0.1, 0.01, 0.3  # shares: of time waited; of loss lost by a change; of gap in loss


def read_rival(folder: Path) -> Summary:
    """The summary of another run, to compare with.

    Raises:
        ConfigurationError: if there is none that has ended.
    """
    try:
        return read_summary(folder)
    except OSError as error:
        raise ConfigurationError(
            f"--against must be the folder of a finished run, got {str(folder)!r}: {error}"
        ) from None


def run_name(folder: Path) -> str:
    """The last two parts of its path: a run without a name has date and time."""
    return "/".join(folder.resolve().parts[-2:])


def conclusions(run: RunRecord, rivals: Mapping[str, Summary]) -> Iterator[str]:
    """Sentences, the most wanted first."""
    summary = run.summary
    if summary.test:
        tested = ", ".join(f"{name} {value:.4g}" for name, value in summary.test.items())
        yield f"{tested}, after {run.last_step:,} steps; the run took {summary.seconds:,.0f} s."
    for change in run.made[:4]:
        before, after = around(run, change, LOSS)
        if before is not None and after is not None:
            end = run.metrics[LOSS][1][-1]
            yield (
                f"Rank {change.ranks} at step {change.step:,}: {LOSS} {before:.4g} before, {after:.4g} after it "
                f"({after / before - 1:+.1%}), {end:.4g} at the end."
            )
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
    """What is compared -> how it came out in each of ``runs``, "–" where it was not measured."""
    rows: list[dict[str, str]] = [
        {name: f"{value:.4g}" for name, value in run.test.items()}
        | ({"gap": f"{run.gap:.3g}"} if run.gap is not None else {})
        | {"adapter parameters": f"{run.parameters['adapter']:,}", "final rank": span(run.final_ranks.values())}
        | {"seconds": f"{run.seconds:,.0f}", "tokens per second": f"{run.tokens_per_second:,.0f}"}
        for run in runs
    ]
    return {name: [row.get(name, "–") for row in rows] for name in dict.fromkeys(name for row in rows for name in row)}


def warnings(run: RunRecord) -> Iterator[str]:
    """What keeps numbers of this run from meaning what they seem to."""
    phases = run.summary.phases
    waited, trained = (sum(getattr(phase, name) for phase in phases) for name in ("waited_seconds", "train_seconds"))
    if trained and waited / trained > BUSY:
        yield (
            f"The machine was busy: training waited for a processor in {waited / trained:.0%} of its time. "
            "Its seconds and tokens per second say nothing about ranks."
        )


def kinds_of_loss(run: RunRecord) -> str:
    """Why the two curves of loss cannot be held against each other."""
    config = run.settings
    smoothing, dropout = config.get("task.label_smoothing"), config.get("lora.dropout")
    causes = [f"label smoothing ({smoothing})"] if smoothing else []
    causes += [f"dropout of the adapter ({dropout})"] if dropout else []
    return (
        f"Training loss is of one batch before its step, with {' and '.join([*causes, 'the dropout of the model'])}; "
        "validation has none of that. The gap at the top is measured alike for both."
    )


def around(run: RunRecord, change: Change, metric: str) -> tuple[float | None, float | None]:
    """The last value of ``metric`` before a change, and the first after it; a validation after n steps is in row n - 1.

    Validations that check a change are made at its step: the first of several before it, the last one after it.
    """
    rows = list(zip(*run.metrics.get(metric, ([], [])), strict=True))
    at = [value for step, value in rows if step == change.step]
    earlier, later = ([v for step, v in rows if step < change.step], [v for step, v in rows if step > change.step])
    before, after = at[:1] if len(at) > 1 else earlier[-1:], at[-1:] or later[:1]
    return before[0] if before else None, after[0] if after else None


def next_commands(run: RunRecord) -> Iterator[tuple[str, str]]:
    """(why, command) of what is worth trying next."""
    config, ranks = run.settings, sorted(set(run.summary.final_ranks.values()))
    middle = round(sum(run.summary.final_ranks.values()) / len(run.summary.final_ranks))
    if run.overrides is not None:
        if run.made:
            yield (
                "the rank of the end from the start, to compare with",
                _train(run, f"lora.rank={middle}", "schedule=fixed"),
            )
            losses = [around(run, change, LOSS) for change in run.made]
            worst = max((after / before - 1 for before, after in losses if before and after), default=0.0)
            if worst > WORSE:
                yield (
                    "undo a change that costs so much",
                    _train(run, f"schedule.how.max_regression={WORSE}", keep="schedule"),
                )
            elif "schedule.final_rank" in config and ranks[0] > 1:
                lower = f"schedule.final_rank={max(1, middle // 2)}"
                yield "the change cost little: go lower", _train(run, lower, keep="schedule")
        if len(ranks) == 1:
            yield (
                "one budget for all layers, in place of one rank",
                _train(run, f"lora.rank={2 * middle}", "schedule=early_budget"),
            )
        gap, loss = run.summary.gap, run.summary.final.get(LOSS)
        if gap is not None and loss and gap > FAR * loss and not config.get("lora.dropout"):
            yield "the gap is wide: regularise", _train(run, "lora.dropout=0.1", keep="schedule")
        yield "how far runs differ by chance", _train(run, "--multirun", "seed=1,2,3", keep="schedule")
    yield "ask the adapter", shlex.join(["dynrank", "predict", str(run.folder / "adapter"), "a text"])
    yield "compare runs on this page", shlex.join(["dynrank", "report", str(run.folder), "--against", "RUN"])


def _train(run: RunRecord, *changes: str, keep: str = "") -> str:
    """The run's own command, with ``changes`` in the place of what they replace."""
    replaced = {change.partition("=")[0] for change in changes} | {"hydra.run.dir", "ckpt_path"}
    if not keep:
        replaced |= {"schedule"}
    kept = []
    for override in run.overrides or ():
        key = override.partition("=")[0].lstrip("+~")
        if key not in replaced and not (not keep and key.startswith(("schedule.", "schedule/"))):
            kept.append(override)
    return shlex.join(["dynrank-train", *kept, *changes])
