"""summary.json: the results of a finished run."""

import json
from dataclasses import field
from pathlib import Path
from typing import Any

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from dynrank.errors import ConfigurationError, read_as
from dynrank.output.console import span

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
        peak_memory_bytes: the largest memory since the training began: on the GPU if there is one, otherwise resident.
        steps: optimizer steps made, those before a resume included.
        changes: step of each change, its reason and what it cost if that was measured, whether it was undone, and the
            factor of the adapters' rate from there on.
        final: metric -> value on training and validation data, at the final weights.
        gap: validation loss minus training loss, at the final weights.
        data: split -> its counts, if the task counts its data.
        weights: which step's weights are tested and exported, and why.
    """

    test: dict[str, float]
    final_ranks: dict[str, int]
    parameters: dict[str, int]
    seconds: float
    tokens_per_second: float
    peak_memory_bytes: int
    steps: int = 0
    changes: list[dict[str, int | float | str | bool]] = field(default_factory=list)
    final: dict[str, float] = field(default_factory=dict)
    gap: float | None = None
    data: dict[str, dict[str, Any]] = field(default_factory=dict)
    weights: str = ""

    def results(self) -> dict[str, str]:
        """{name: value} for people; metrics of training and validation data are of the final weights."""
        metrics = self.test | {f"{name} at the end": value for name, value in self.final.items()}
        if self.gap is not None:
            metrics["gap: val/loss - train/loss"] = self.gap
        return {name: f"{value:.4g}" for name, value in metrics.items()} | {
            "steps": f"{self.steps:,}" if self.steps else "–",
            "rank": span(self.final_ranks.values()),
            **{f"{name} parameters": f"{count:,}" for name, count in self.parameters.items()},
            "seconds": f"{self.seconds:,.0f}",
            "tokens per second in training": f"{self.tokens_per_second:,.0f}",
            "peak memory": f"{self.peak_memory_bytes / 2**20:,.0f} MiB",
            "weights": self.weights,
        }


def read_summary(folder: Path) -> Summary:
    """The summary of the run in ``folder``."""
    file = folder / SUMMARY
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{str(folder)!r} must be the folder of a finished run; {SUMMARY}: {error}") from None
    return read_as(Summary, content, str(file))
