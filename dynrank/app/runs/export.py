"""The files of a finished run: the adapter, summary.json and the report."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from torch import Tensor, nn
from torch.optim import Optimizer

from dynrank.adapters.base import Base
from dynrank.adapters.save import save_adapter
from dynrank.adapters.sidecar_files import write_sidecar_files
from dynrank.app.models.pretrained import storage_bytes
from dynrank.app.runs.command import command
from dynrank.app.runs.folder import ADAPTER
from dynrank.app.runs.report.page import write_card, write_report
from dynrank.app.runs.run_meter import RunMeter, peak_memory_bytes
from dynrank.app.runs.summary import Summary, print_summary, write_summary
from dynrank.callbacks import RankEvent
from dynrank.layers.finding import adapter_parameters, lora_layers, parameter_count

# Prefix of the metrics that a test measures on training and validation data.
_FINAL = "final/"


def summarise(
    model: nn.Module,
    history: Iterable[RankEvent],
    metrics: Mapping[str, float],
    meter: RunMeter,
    held: dict[str, int],
    seconds: float,
    data: dict[str, dict[str, Any]],
    weights: str,
) -> Summary:
    """The contents of summary.json; ``held`` are the :func:`held_bytes` before the test, which gave ``metrics``."""
    final = {name.removeprefix(_FINAL): float(value) for name, value in metrics.items() if name.startswith(_FINAL)}
    both = final.keys() >= {"train/loss", "val/loss"}
    return Summary(
        test={name: float(value) for name, value in metrics.items() if not name.startswith(_FINAL)},
        final=final,
        gap=final["val/loss"] - final["train/loss"] if both else None,
        final_ranks={name: layer.rank for name, layer in lora_layers(model)},
        changes=[
            {
                "step": event.step,
                "reason": event.reason_and_cost,
                "undone": event.undone,
                "lr_factor": event.lr_factor,
            }
            for event in history
        ],
        parameters={
            "adapter": sum(factor.numel() for factor in adapter_parameters(model)),
            "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "total": parameter_count(model.parameters()),
        },
        bytes=held,
        seconds=seconds,
        step_seconds=meter.step_seconds(event.step for event in history if not event.undone),
        tokens_per_second=meter.tokens_per_second,
        peak_memory_bytes=peak_memory_bytes(),
        data=data,
        weights=weights,
    )


def held_bytes(model: nn.Module, optimizers: Iterable[Optimizer]) -> dict[str, int]:
    """Bytes of the LoRA factors, of the gradients of all trained parameters, and of the optimizer state, as of now."""
    states = [state for optimizer in optimizers for state in optimizer.state.values()]
    return {
        "adapter": sum(factor.nbytes for factor in adapter_parameters(model)),
        "gradients": sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad),
        "optimizer": storage_bytes(value for state in states for value in state.values() if isinstance(value, Tensor)),
    }


def export(
    model: nn.Module, task: Any, summary: Summary, folder: Path, config: DictConfig, steps: int, base: Base
) -> None:
    """Write the files of a finished run into ``folder``; summary.json, the mark of a finished run, after others."""
    # Not every task has a tokenizer, or says how it makes inputs.
    tokenizer = getattr(task, "tokenizer", None)
    inputs = getattr(task, "training_inputs", None)
    adapter = folder / ADAPTER
    save_adapter(model, adapter)
    write_sidecar_files(adapter, model, tokenizer, inputs, base)
    write_card(adapter, model, summary, steps, command(folder))
    write_summary(summary, folder)
    report = write_report(folder) if config.plots else None
    print_summary(summary, folder, report)
