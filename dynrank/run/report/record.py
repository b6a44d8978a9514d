"""What the files of a finished run say, read and held against each other."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from dynrank.adapters.inspection import LayerSpectrum, inspect_adapter
from dynrank.driver.event import FIELDS, RankEvent
from dynrank.errors import ConfigurationError
from dynrank.output.checkpoint_file import read_checkpoint
from dynrank.output.console import span
from dynrank.output.metrics_csv import series

__all__ = ["Change", "LayerChange", "RunRecord", "read_run"]

_SUMMARY = {"test": dict, "final_ranks": dict, "parameters": dict, "phases": list}
_NUMBERS = ("seconds", "tokens_per_second", "peak_memory_bytes")


@dataclass(frozen=True)
class LayerChange:
    """A line of rank_history.csv: what a change did to a layer."""

    rank_before: int
    rank_after: int
    energy_kept: float
    predicted_error: float


@dataclass(frozen=True)
class Change:
    """Lines of rank_history.csv that belong together: one change of ranks, or one that was taken back."""

    step: int
    reason: str
    layers: dict[str, LayerChange] = field(default_factory=dict)

    @property
    def undone(self) -> bool:
        return self.reason.startswith("undone")

    @property
    def ranks(self) -> str:
        """``32 → 16``, or ranges where layers differ."""
        before, after = ({getattr(la, name) for la in self.layers.values()} for name in ("rank_before", "rank_after"))
        return f"{span(before)} → {span(after)}"


@dataclass(frozen=True)
class RunRecord:
    """A finished run.

    Attributes:
        folder: where it is.
        config: its whole configuration, YAML.
        overrides: what was given on the command line; None: not recorded.
        summary: summary.json.
        last_step: optimizer steps made.
        changes: in the order in which they were made.
        layers: of the exported adapter, layer -> spectrum, in the order of the model.
        earlier_spectra: optimizer step -> layer -> singular values right before the change there, of those changes
            that the last checkpoint knows of.
    """

    folder: Path
    config: str
    overrides: list[str] | None
    summary: Mapping[str, Any]
    last_step: int
    changes: list[Change]
    layers: dict[str, LayerSpectrum]
    earlier_spectra: dict[int, dict[str, tuple[float, ...]]]

    @property
    def made(self) -> list[Change]:
        """The changes that were not taken back."""
        return [change for change in self.changes if not change.undone]

    def ranks(self) -> dict[str, list[tuple[int, int]]]:
        """Layer -> (optimizer step, rank from there on), from step 0."""
        ranks: dict[str, list[tuple[int, int]]] = {}
        for name, last in self.summary["final_ranks"].items():
            own = [(change.step, change.layers[name]) for change in self.made if name in change.layers]
            ranks[name] = [(0, own[0][1].rank_before if own else last), *((step, la.rank_after) for step, la in own)]
        return ranks


def read_run(folder: Path, config: str | None = None) -> RunRecord:
    """Read the files of a run that has ended.

    Args:
        folder: with summary.json, metrics.csv, rank_history.csv and adapter/; of .hydra/ and checkpoints/last.ckpt
            what is there.
        config: the run's configuration as YAML, for a run that Hydra did not start; else .hydra/config.yaml has it.

    Raises:
        ConfigurationError: if a file is missing or broken, or they are not all of one run.
    """
    summary = _summary(folder)
    if config is None or (folder / ".hydra" / "config.yaml").exists():
        config = _text(folder, ".hydra/config.yaml")
    given = folder / ".hydra" / "overrides.yaml"
    changes = _changes(folder)
    layers = {layer.layer: layer for layer in inspect_adapter(folder / "adapter")}
    ranks: dict[str, int] = summary["final_ranks"]
    changed = {name for change in changes for name in change.layers}
    if ranks != {name: layer.rank for name, layer in layers.items()} or not changed <= set(ranks):
        raise ConfigurationError(
            f"{str(folder)!r} must hold the files of one run: the layers or ranks of summary.json, adapter/ and "
            "rank_history.csv differ"
        )
    last = folder / "checkpoints" / "last.ckpt"
    checkpoint = read_checkpoint(last) if last.exists() else {}
    return RunRecord(
        folder=folder,
        config=config,
        overrides=_overrides(given) if given.exists() else None,
        summary=summary,
        last_step=max(_last_step(folder, summary["test"]), checkpoint.get("global_step", 0)),
        changes=changes,
        layers={name: layers[name] for name in ranks},
        earlier_spectra=_earlier_spectra(checkpoint),
    )


def _text(folder: Path, name: str) -> str:
    try:
        return (folder / name).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(
            f"{str(folder)!r} must be the folder of a finished run, it has no {name} that can be read: {error.strerror}"
        ) from None
    except UnicodeDecodeError:
        raise ConfigurationError(f"{str(folder / name)!r} is no text") from None


def _last_step(folder: Path, tested: Mapping[str, float]) -> int:
    _text(folder, "metrics.csv")
    steps = {name: series(folder / "metrics.csv", name)[0] for name in ("train/loss", "val/loss", *tested)}
    made = [step + (name not in tested) for name in steps for step in steps[name]]  # in training, a step's index
    if not made:
        raise ConfigurationError(f"{str(folder / 'metrics.csv')!r} must hold losses or results, it has none")
    return max(1, *made)


def _summary(folder: Path) -> dict[str, Any]:
    try:
        summary: dict[str, Any] = json.loads(_text(folder, "summary.json"))
        wrong = [name for name, kind in _SUMMARY.items() if not isinstance(summary[name], kind)]
        wrong += [name for name in _NUMBERS if not isinstance(summary[name], int | float)]
        numbers = [*summary["test"].values(), *summary["final_ranks"].values(), *summary["parameters"].values()]
        numbers += [value for phase in summary["phases"] for value in phase.values()]
        if wrong or not all(isinstance(number, int | float) for number in numbers):
            raise TypeError(f"{wrong or 'a value'} of another type")
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ConfigurationError(
            f"{str(folder / 'summary.json')!r} is not what a run writes at its end: {type(error).__name__}: {error}"
        ) from None
    return summary


def _overrides(file: Path) -> list[str]:
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigurationError(f"{str(file)!r} cannot be read: {error!s:.200}") from None
    if not isinstance(found, list):
        raise ConfigurationError(f"{str(file)!r} must hold a list")
    return [str(override) for override in found]


def _changes(folder: Path) -> list[Change]:
    rows = csv.DictReader(_text(folder, "rank_history.csv").splitlines())
    changes: list[Change] = []
    for row in rows:
        try:
            step, layer, reason = int(row["step"]), row["layer"], row["reason"]
            before, after = int(row["rank_before"]), int(row["rank_after"])
            change = LayerChange(before, after, float(row["energy_kept"]), float(row["predicted_error"]))
            if reason is None or None in row:
                raise ValueError
        except (KeyError, TypeError, ValueError):
            raise ConfigurationError(
                f"{str(folder / 'rank_history.csv')!r} must hold {', '.join(FIELDS)} in each line, line "
                f"{rows.line_num} does not"
            ) from None
        last = changes[-1] if changes else None
        if last is None or (last.step, last.reason) != (step, reason) or layer in last.layers:
            changes.append(Change(step, reason))
        changes[-1].layers[layer] = change
    return changes


def _earlier_spectra(checkpoint: Mapping[str, Any]) -> dict[int, dict[str, tuple[float, ...]]]:
    states = [state for name, state in checkpoint.get("callbacks", {}).items() if name.startswith("RankScheduler")]
    events = [RankEvent.from_state(event) for state in states for event in state["history"]]
    return {
        event.step: {layer.layer.removeprefix("model."): layer.singular_values for layer in event.layers}
        for event in events
        if not event.undone
    }
