"""The files of a finished run: the adapter, summary.json and the report."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from torch import nn

from dynrank.adapters.base import Base
from dynrank.adapters.save import save_adapter
from dynrank.adapters.sidecar_files import write_sidecar_files
from dynrank.app.console import print_facts
from dynrank.app.runs.command import command
from dynrank.app.runs.folder import ADAPTER
from dynrank.app.runs.report.page import write_card, write_report
from dynrank.app.runs.run_meter import peak_memory_bytes
from dynrank.app.runs.summary import SUMMARY, Summary
from dynrank.callbacks import RankEvent
from dynrank.layers.finding import adapter_parameters, lora_layers, parameter_count
from dynrank.output.whole_file import whole_file

# Prefix of the metrics that a test measures on training and validation data.
_FINAL = "final/"


def summarise(model: nn.Module, history: Iterable[RankEvent], metrics: Mapping[str, float], **others: Any) -> Summary:
    """The contents of summary.json; ``metrics`` are those of the test, ``others`` fields of the summary."""
    final = {name.removeprefix(_FINAL): float(value) for name, value in metrics.items() if name.startswith(_FINAL)}
    both = final.keys() >= {"train/loss", "val/loss"}
    return Summary(
        test={name: float(value) for name, value in metrics.items() if not name.startswith(_FINAL)},
        final=final,
        gap=final["val/loss"] - final["train/loss"] if both else None,
        final_ranks={name: layer.rank for name, layer in lora_layers(model)},
        changes=[
            {"step": event.step, "reason": event.reason_and_cost, "undone": event.undone, "lr_factor": event.lr_factor}
            for event in history
        ],
        parameters={
            "adapter": sum(factor.numel() for factor in adapter_parameters(model)),
            "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "total": parameter_count(model.parameters()),
        },
        peak_memory_bytes=peak_memory_bytes(),
        **others,
    )


def export(model: nn.Module, task: Any, summary: Summary, folder: Path, config: DictConfig, base: Base) -> None:
    """Write the files of a finished run into ``folder``; summary.json, the mark of a finished run, after others."""
    # Not every task has a tokenizer, or says how it makes inputs.
    tokenizer = getattr(task, "tokenizer", None)
    inputs = getattr(task, "training_inputs", None)
    adapter = folder / ADAPTER
    save_adapter(model, adapter)
    write_sidecar_files(adapter, model, tokenizer, inputs, base)
    write_card(adapter, model, summary, command(folder))
    with whole_file(folder / SUMMARY) as part:
        part.write_text(json.dumps(asdict(summary), indent=2) + "\n", encoding="utf-8")
    report = {"report": write_report(folder)} if config.plots else {}
    print_facts({**summary.results(), "files": folder, **report})
