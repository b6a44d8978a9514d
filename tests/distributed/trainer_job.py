"""What one of two processes does under accelerate's FSDP2, in transformers' Trainer and in loops; with a folder."""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import as_gpus
import torch
import wrapped_loops
from ends import keep
from forked import free_port
from torch import distributed, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from trainer_runs import CHANGE, IN_ONE, RESUMED, RUNS, SAVED, SCORED, SHARDS, Run, outcome, trained, trainer_of
from transformers import TrainingArguments
from transformers.distributed import DistributedConfig

import dynrank
from dynrank.errors import ConfigurationError
from dynrank.schedules import Stage
from dynrank.targets import Rank
from dynrank.triggers import At

CUT = Stage(At(step=CHANGE), Rank(3))


def whole(run: Run, base: Path, folder: Path) -> Any:
    made, schedule = trained(run, base, folder)
    return outcome(made, schedule)


def resumed(run: Run, steps: Sequence[int], base: Path, folder: Path) -> Any:
    """The run that nothing stops, what its checkpoints lead to, and what ``save_model`` has left."""
    made, schedule = trained(run, base, folder, save_strategy="steps", save_steps=SAVED[0])
    made.save_model(folder / "end")
    if distributed.get_rank() == 0:
        dynrank.save_adapter(made.model, folder / "by dynrank")
    ends = {"whole": outcome(made, schedule)}
    for step in steps:
        again = trained(run, base, folder / "again", resume=folder / f"checkpoint-{step}")
        ends[f"step {step}"] = outcome(*again)
    return ends


def best(base: Path, folder: Path, rising: int) -> Any:
    """The step of the best model, the one before the cut if scores fall, and what was loaded at the end."""
    scores = itertools.count(0, rising)
    made, schedule = trainer_of(Run(stages=CUT), base, folder, save_strategy="steps", save_steps=3, **SCORED)
    schedule.keep_best_before = True
    made.compute_metrics = lambda _: {"score": float(next(scores))}
    made.train()
    return made.state.best_global_step, outcome(made, schedule)["weights"]


def in_one(run: Run, base: Path, folder: Path) -> Any:
    """What a checkpoint of two processes, from after the change, leads to in one."""
    return outcome(*trained(run, base, folder / "one", resume=folder / f"checkpoint-{SAVED[-1]}"))


def by_transformers(base: Path, folder: Path) -> Any:
    """transformers shards the base when it is loaded, and averages adapters by itself."""
    run = RESUMED["peft"][0]
    given = replace(run, base={"distributed_config": DistributedConfig(fsdp_size=2)})
    return outcome(*trained(given, base, folder, fsdp=None))


class OfVLLM(TrainingArguments):
    """As TRL's trainers have them."""

    use_vllm = True


def refused(make: Any) -> str:
    try:
        make()
    except ConfigurationError as error:
        return str(error)
    return "not refused"


def late(base: Path, folder: Path) -> None:
    made, schedule = trainer_of(RESUMED["peft"][0], base, folder, callbacks=[])
    made.add_callback(schedule)
    made.train()


def by_fsdp1() -> None:
    model = dynrank.add_lora(nn.Sequential(nn.Linear(6, 12)), rank=4)
    dynrank.resize(FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu")), 2)


def by_accelerate_alone() -> None:
    model = dynrank.add_lora(nn.Sequential(nn.Linear(6, 12)), rank=4)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    accelerator = wrapped_loops.accelerator_of_fsdp2()
    model, optimizer = accelerator.prepare(model, optimizer)
    dynrank.resize(model, 2, optimizers=[optimizer])


def main(place: str) -> None:
    folder = Path(place)
    base = folder / "base"
    process = int(os.environ["RANK"])
    warnings.simplefilter("ignore")
    as_gpus.pretend()
    checks = {name: partial(whole, run, base, folder / name) for name, run in RUNS.items()}
    for name, (run, steps) in RESUMED.items():
        checks[f"resume {name}"] = partial(resumed, run, steps, base, folder / f"resume {name}")
    checks["best, before"] = partial(best, base, folder / "best, before", -1)
    checks["best, after"] = partial(best, base, folder / "best, after", 1)
    checks["by transformers"] = partial(by_transformers, base, folder / "by transformers")
    for way in wrapped_loops.SHARDED:
        checks[f"loop, {way}"] = partial(wrapped_loops.ended, way, process, 2)
    for name, options in {
        "FSDP1": {"fsdp_config": {"version": 1, "sync_module_states": False}},
        "activation checkpointing": {"fsdp_config": {"activation_checkpointing": True}},
        "best of shards": {"fsdp_config": dict(SHARDS), "save_strategy": "steps", "save_steps": 3} | SCORED,
    }.items():
        checks[f"refused, {name}"] = partial(
            refused, partial(trainer_of, RESUMED["peft"][0], base, folder / name, **options)
        )
    checks["refused, vLLM"] = partial(
        refused, partial(trainer_of, RESUMED["peft"][0], base, folder / "vllm", kind=OfVLLM)
    )
    checks["refused, late"] = partial(refused, partial(late, base, folder / "late"))
    checks["refused, FSDP1 in a loop"] = partial(refused, by_fsdp1)
    checks["refused, accelerate alone"] = partial(refused, by_accelerate_alone)
    results: dict[str, Any] = {}
    keep(checks, folder / f"{process}.pt", results)
    distributed.destroy_process_group()
    if process == 0:
        os.environ |= {"WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_PORT": free_port()}
        one = {f"in one, {n}": partial(in_one, RESUMED[n][0], base, folder / f"resume {n}") for n in IN_ONE}
        keep(one, folder / "0.pt", results)
        distributed.destroy_process_group()
