"""summary.json: the results of a finished run."""

import json
from dataclasses import asdict, field
from pathlib import Path
from typing import Any

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from dynrank.app.console import print_facts
from dynrank.errors import ConfigurationError, read_as
from dynrank.output.console import span
from dynrank.output.whole_file import whole_file

SUMMARY = "summary.json"

# Another version may write more fields.
_FORMAT = ConfigDict(strict=True, extra="ignore")


@dataclass(config=_FORMAT)
class Summary:
    """The contents of summary.json; fields with a default are missing where an earlier version wrote it.

    Attributes:
        test: metric -> value on test data.
        final_ranks: layer -> rank.
        parameters: how many are in the ``adapter``, ``trainable``, and in ``total``.
        seconds: of the whole run.
        tokens_per_second: in training batches.
        peak_memory_bytes: the largest memory of the process: on the GPU if there is one, otherwise resident.
        changes: step of each change, its reason and what it cost if that was measured, whether it was undone, and the
            factor of the adapters' rate from there on.
        final: metric -> value on training and validation data, at the final weights.
        gap: validation loss minus training loss, at the final weights.
        bytes: of ``adapter``, ``gradients`` and ``optimizer``, at the final ranks.
        step_seconds: median of the optimizer steps at the last ranks that were trained; None where there was none.
        data: split -> its counts, if the task counts its data.
        weights: which step's weights are tested and exported, and why.
    """

    test: dict[str, float]
    final_ranks: dict[str, int]
    parameters: dict[str, int]
    seconds: float
    tokens_per_second: float
    peak_memory_bytes: int
    changes: list[dict[str, int | float | str | bool]] = field(default_factory=list)
    final: dict[str, float] = field(default_factory=dict)
    gap: float | None = None
    bytes: dict[str, int] = field(default_factory=dict)
    step_seconds: float | None = None
    data: dict[str, dict[str, Any]] = field(default_factory=dict)
    weights: str = ""


def read_summary(folder: Path) -> Summary:
    """The summary of the run in ``folder``."""
    file = folder / SUMMARY
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(f"{str(folder)!r} must be the folder of a finished run: {error}") from None
    except ValueError as error:
        raise ConfigurationError(f"{str(file)!r} is not what a run writes at its end: {error}") from None
    return read_as(Summary, content, str(file))


def write_summary(summary: Summary, folder: Path) -> None:
    """Write summary.json into ``folder``; this marks its run as finished."""
    with whole_file(folder / SUMMARY) as part:
        part.write_text(json.dumps(asdict(summary), indent=2) + "\n", encoding="utf-8")


def results_of(summary: Summary) -> dict[str, str]:
    """{name: value} of what a run ended with; metrics of training and validation data are of the final weights."""
    metrics = summary.test | {f"{name} at the end": value for name, value in summary.final.items()}
    if summary.gap is not None:
        metrics["gap: val/loss - train/loss"] = summary.gap
    return {name: f"{value:.4g}" for name, value in metrics.items()} | {
        "rank": span(summary.final_ranks.values()),
        **{f"{name} parameters": f"{count:,}" for name, count in summary.parameters.items()},
        "seconds": f"{summary.seconds:,.0f}",
        "tokens per second in training": f"{summary.tokens_per_second:,.0f}",
        "peak memory": f"{summary.peak_memory_bytes / 2**20:,.0f} MiB",
    }


def print_summary(summary: Summary, folder: Path, report: Path | None) -> None:
    """Print the results of the run in ``folder``; ``report`` is its page, if it has one."""
    facts = results_of(summary) | {"weights": summary.weights, "files": str(folder)}
    print_facts(facts if report is None else facts | {"report": str(report)})
