"""What one of two processes does: every run, every resume, every refusal; started as torchrun does, with a folder."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import torch
from distributed_runs import (
    CHANGE,
    CROSSED,
    CROSSINGS,
    RESUMED,
    RUNS,
    Run,
    fit,
    outcome,
    saved,
    saving,
    strategy_of,
)  # fmt: skip
from ends import keep
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import distributed
from wrapped_loops import WAYS, ended

from dynrank.callbacks import AdapterCheckpoint
from dynrank.distributed.processes import from_all, from_first
from dynrank.errors import ConfigurationError


class Spoil(lightning.Callback):
    """Process 1 comes by another number than process 0 in the step before the change."""

    def __init__(self, what: str) -> None:
        self.what = what

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == CHANGE and trainer.global_rank == 1:
            factor = pl_module.net[2].lora_A
            (factor if self.what == "weights" else trainer.optimizers[0].state[factor]["exp_avg_sq"])[0, 0] += 1e-3


def whole(run: Run) -> Any:
    return outcome(*fit(run, strategy=strategy_of(run), devices=2))


def resumed(run: Run, steps: Sequence[int], folder: Path, *, kind: Any = ModelCheckpoint, **strategy: Any) -> Any:
    """The run that nothing stops, and what its checkpoints of these steps lead to."""
    options = saving(folder, kind)
    ends = {"whole": outcome(*fit(run, strategy=strategy_of(run, **strategy), devices=2, **options))}
    for step in steps:
        again = {"strategy": strategy_of(run, **strategy), "ckpt_path": saved(folder, step)}
        ends[f"step {step}"] = outcome(*fit(run, devices=2, **again))
    return ends


def crossed(run: Run, folder: Path) -> Any:
    """What the checkpoints of other processes lead to here."""
    return [
        outcome(*fit(run, strategy=strategy_of(run), devices=2, ckpt_path=saved(folder, step))) for step in CROSSINGS
    ]


def refusal(run: Run, **options: Any) -> str:
    try:
        fit(run, strategy=strategy_of(run), devices=2, **options)
    except ConfigurationError as error:
        return str(error)
    return "not refused"


class Unpicklable(Exception):
    """An error that cannot be made again from what it is pickled to."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(one + two)


def raised_in_first(make: Any) -> list[tuple[str, str]]:
    """The error that :func:`from_first` raises here, and that the processes go on together afterwards."""
    try:
        from_first(make)
    except BaseException as error:
        return from_all((type(error).__name__, str(error)))
    return []


def fail(error: BaseException) -> None:
    raise error


def another_base(run: Run, folder: Path) -> str:
    """Resuming where one shard of the base is another one."""

    class Other(lightning.Callback):
        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            with torch.no_grad():
                pl_module.net[2].base.weight.to_local().add_(trainer.global_rank)

    return refusal(run, callbacks=[Other()], ckpt_path=saved(folder, CHANGE))


def main(place: str) -> None:
    folder = Path(place)
    checks = {name: partial(whole, run) for name, run in RUNS.items()}
    for name, (run, steps, strategy) in RESUMED.items():
        checks[f"resume {name}"] = partial(resumed, run, steps, folder / name, **strategy)
    for to in ("ddp", "fsdp2"):
        for source, (_, name) in CROSSED.items():
            if source != to:
                checks[f"{to} from {source}"] = partial(crossed, CROSSED[to][0], folder / name)
    for what in ("weights", "optimizer state"):
        checks[f"other {what}"] = partial(refusal, RUNS["ddp"], callbacks=[Spoil(what)])
    for error in (KeyError("key"), KeyboardInterrupt("stop"), ConfigurationError("bad"), Unpicklable("a", "b")):
        checks[f"raised {type(error).__name__}"] = partial(raised_in_first, partial(fail, error))
    checks["raised by pickle"] = partial(raised_in_first, lambda: lambda: None)
    checks["a folder without the base"] = partial(
        refusal, RUNS["fsdp2"], callbacks=[AdapterCheckpoint(folder / "shards")], enable_checkpointing=True
    )
    checks["another base"] = partial(another_base, RUNS["fsdp2"], folder / "fsdp2, without the base")
    checks["sharded"] = partial(refusal, Run(model={"sharded": True}, ddp=None))
    warnings.simplefilter("ignore")
    process = int(os.environ["RANK"])
    for way in WAYS:
        checks[f"loop, {way}"] = partial(ended, way, process, 2)
    keep(checks, folder / f"{process}.pt", {})
    distributed.destroy_process_group()
