"""Runs of transformers' Trainer whose ranks change, under DDP and under DeepSpeed's ZeRO.

Stage 0 is DDP, whose factors really change their shapes; 1, 2 and 3 are those of ZeRO.
"""

from __future__ import annotations

import itertools
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from accelerate.state import AcceleratorState, GradientState
from ends import keep
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, distributed
from torch.optim import SGD, Adafactor, Adam, AdamW, NAdam, Optimizer, RAdam, RMSprop
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

import dynrank
from dynrank.callbacks import RankTrainerCallback
from dynrank.errors import ConfigurationError
from dynrank.schedules import How, Stage
from dynrank.targets import Budget, GrowTo, Rank
from dynrank.triggers import At

STEPS = 12
CHANGE = 5
# Checkpoints before the change, at it, and after it.
SAVED = (3, CHANGE, 6, 8)
RANK = 7
# Two processes cannot share the factors evenly: some have 7 x 25 numbers.
SIZE = {"vocab_size": 40, "hidden_size": 20, "intermediate_size": 25, "num_hidden_layers": 2, "num_attention_heads": 2}
LAYERS = ["q_proj", "up_proj", "down_proj"]


def save_base(folder: Path) -> None:
    torch.manual_seed(0)
    hf.LlamaForCausalLM(hf.LlamaConfig(**SIZE, initializer_range=0.3)).save_pretrained(folder)


def peft(base: Any, layers: Sequence[str] = LAYERS, **options: Any) -> Any:
    torch.manual_seed(0)
    return get_peft_model(base, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=[*layers], **options))


def with_head(base: Any) -> Any:
    return peft(base, modules_to_save=["lm_head"])


def with_embedding(base: Any) -> Any:
    return peft(base, [*LAYERS, "embed_tokens"])


def own(base: Any) -> Any:
    torch.manual_seed(0)
    return dynrank.add_lora(base, rank=RANK, alpha=RANK, target_modules=LAYERS)


def own_with_head(base: Any) -> Any:
    model = own(base)
    model.lm_head.requires_grad_(True)
    return model


CUT = Stage(At(step=CHANGE), Rank(3), how=How(lr_factor="sqrt"))
PLAIN_CUT = replace(CUT, how=How())
HALF = Stage(At(step=CHANGE), Budget(share=0.5), how=How(lr_factor="sqrt"))
TWO_CUTS = [Stage(At(step=CHANGE), Rank(5)), Stage(At(step=8), Rank(2))]
GROWTH = [CUT, Stage(At(step=8), GrowTo(6))]


@dataclass
class Run:
    """A run; ``trainer`` are arguments of the Trainer, and ``zero`` settings of ds.json."""

    make: Callable[[Any], Any] = peft
    stages: Any = CUT
    trainer: dict[str, Any] = field(default_factory=dict)
    zero: dict[str, Any] = field(default_factory=dict)
    # Class and arguments; None: the Trainer's own AdamW.
    optimizer: tuple[type[Optimizer], dict[str, Any]] | None = None
    # ZeRO-3 partitions the base when it is loaded (zero.Init).
    partitioned: bool = False


ACCUMULATED = {"gradient_accumulation_steps": 2}
OFFLOADED = {"offload_optimizer": {"device": "cpu"}}
BOTH_OFFLOADED = {**OFFLOADED, "offload_param": {"device": "cpu"}}
# accelerate takes DeepSpeed's own Adam instead of torch's only if that is not forbidden.
BY_TORCH = {"zero_force_ds_cpu_optimizer": False}
# {name: (run, stages of ZeRO)}
RUNS: dict[str, tuple[Run, Sequence[int]]] = {
    "a cut": (Run(), (1, 2, 3)),
    "by importance": (Run(stages=HALF), (1, 2, 3)),
    "accumulated, two cuts": (Run(stages=TWO_CUTS, trainer=ACCUMULATED), (2, 3)),
    "accumulated, by importance": (Run(stages=HALF, trainer=ACCUMULATED), (2, 3)),
    "a cut and growth": (Run(stages=GROWTH), (1, 2, 3)),
    "without clipping": (Run(stages=HALF, trainer={"max_grad_norm": 0.0}), (2, 3)),
    "kept by its check": (Run(stages=replace(CUT, how=How(max_regression=10.0))), (2, 3)),
    "undone by its check": (Run(stages=replace(HALF, to=Rank(1), how=How(max_regression=0.0001))), (1, 2, 3)),
    "gradient checkpointing": (Run(trainer={"gradient_checkpointing": True}), (2, 3)),
    "factors that stay whole": (Run(zero={"zero_optimization": {"stage3_param_persistence_threshold": 10**5}}), (3,)),
    "zero.Init": (Run(partitioned=True, stages=HALF), (3,)),
    "sub-groups": (Run(zero={"zero_optimization": {"sub_group_size": 300}}, stages=HALF), (3,)),
    "optimizer on the CPU, torch's": (Run(stages=HALF, zero={"zero_optimization": OFFLOADED, **BY_TORCH}), (2, 3)),
    "optimizer and base on the CPU": (Run(stages=HALF, zero={"zero_optimization": BOTH_OFFLOADED, **BY_TORCH}), (3,)),
    "a head": (Run(with_head, PLAIN_CUT), (1, 2, 3)),
    "an embedding": (Run(with_embedding), (2, 3)),
    "add_lora": (Run(own, HALF), (1, 2, 3)),
    "add_lora, zero.Init": (Run(own, HALF, partitioned=True), (3,)),
    "add_lora, a head": (Run(own_with_head, PLAIN_CUT), (2, 3)),
    "add_lora, a cut and growth": (Run(own, GROWTH), (2, 3)),
    "Adam, amsgrad": (Run(optimizer=(Adam, {"lr": 1e-2, "amsgrad": True})), (2, 3)),
    "SGD": (Run(optimizer=(SGD, {"lr": 1.0, "weight_decay": 0.1})), (2, 3)),
    "SGD, momentum": (Run(stages=HALF, optimizer=(SGD, {"lr": 1.0, "momentum": 0.9, "weight_decay": 0.1})), (2, 3)),
    "RMSprop": (Run(optimizer=(RMSprop, {"lr": 1e-3, "momentum": 0.9})), (2, 3)),
    "NAdam": (Run(optimizer=(NAdam, {"lr": 1e-2, "weight_decay": 0.1})), (2, 3)),
    "RAdam": (Run(optimizer=(RAdam, {"lr": 1e-2})), (2, 3)),
}  # fmt: skip
RESUMED: dict[str, tuple[Run, Sequence[int]]] = {
    "by importance": (Run(stages=[HALF, Stage(At(step=7), GrowTo(6))]), (1, 2, 3)),
    "accumulated": (Run(stages=HALF, trainer=ACCUMULATED), (2, 3)),
    "optimizer on the CPU, torch's": (Run(stages=HALF, zero={"zero_optimization": OFFLOADED, **BY_TORCH}), (2, 3)),
    "in bfloat16": (Run(stages=HALF, trainer={"bf16": True}), (1, 2, 3)),
    "add_lora": (Run(own, HALF), (1, 2, 3)),
    "a head": (Run(with_head, replace(HALF, how=How())), (2, 3)),
    "SGD": (Run(stages=HALF, optimizer=(SGD, {"lr": 1.0})), (2, 3)),
}


def data() -> list[dict[str, Any]]:
    rows = torch.randint(40, (96, 6), generator=torch.Generator().manual_seed(1)).tolist()
    return [{"input_ids": row, "labels": row} for row in rows]


def settings(stage: int, run: Run) -> dict[str, Any]:
    """The content of ds.json."""
    zero: dict[str, Any] = {"stage": stage}
    if stage == 3:
        zero |= {"stage3_gather_16bit_weights_on_model_save": True, "stage3_param_persistence_threshold": 0}
    auto = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    zero |= run.zero.get("zero_optimization", {})
    made: dict[str, Any] = {"bf16": {"enabled": "auto"}, **dict.fromkeys(auto, "auto")}
    return made | run.zero | {"zero_optimization": zero}


class OptimizerTrainer(Trainer):  # type: ignore[misc]
    """The Trainer with an optimizer of another class."""

    made: Any = None

    def create_optimizer(self, model: Any = None) -> Any:
        if self.made is None:
            return super().create_optimizer(model)
        cls, options = self.made
        if self.optimizer is None:
            self.optimizer = cls([p for p in self.model.parameters() if p.requires_grad], **options)
        return self.optimizer


class Dead(TrainerCallback):  # type: ignore[misc]
    """Reads by DeepSpeed's own functions what masters and moments have behind the live directions, after each step."""

    def __init__(self, schedule: RankTrainerCallback) -> None:
        self.schedule = schedule
        self.largest = 0.0
        self.looked = 0

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        ranks = dict(dynrank.lora_layers(self.schedule._run.model))
        # ZeRO-1 and 2 have no moments to read until the first step after a resume.
        for name, layer in dynrank.lora_layers(model):
            for dim, factor in enumerate((layer.lora_A, layer.lora_B)):
                full = [safe_get_full_fp32_param(factor)]
                for key in ("exp_avg", "exp_avg_sq"):
                    full.append(safe_get_full_optimizer_state(factor, key))
                for value in full:
                    dead = value.narrow(dim, ranks[name].rank, value.shape[dim] - ranks[name].rank)
                    self.looked += dead.numel()
                    self.largest = max(self.largest, float(dead.abs().max()) if dead.numel() else 0.0)


def forget_state() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    unset_hf_deepspeed_config()
    for name in [name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_"))]:
        del os.environ[name]


def trainer_of(
    run: Run, stage: int, base: Path, folder: Path, kind: Any = TrainingArguments, **options: Any
) -> tuple[Any, Any]:
    """(trainer, its callback)."""
    forget_state()
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    given: dict[str, Any] = {
        "max_steps": STEPS, "per_device_train_batch_size": 4 // processes, "per_device_eval_batch_size": 8 // processes,
        "learning_rate": 1e-2, "logging_steps": 1, "seed": 0, "use_cpu": True, "report_to": [], "disable_tqdm": True,
        "save_strategy": "no", "weight_decay": 0.1, "max_grad_norm": 0.1, "lr_scheduler_type": "linear",
        "ddp_backend": "gloo" if "RANK" in os.environ else None,
    }  # fmt: skip
    if stage:
        given["deepspeed"] = settings(stage, run)
    made = None if run.partitioned and stage == 3 else run.make(hf.LlamaForCausalLM.from_pretrained(base))
    arguments = kind(output_dir=str(folder), **given | run.trainer | options)
    model = made or run.make(hf.LlamaForCausalLM.from_pretrained(base))
    schedule = RankTrainerCallback(run.stages, evaluate=lambda: trainer.evaluate())
    trainer = OptimizerTrainer(model, arguments, train_dataset=data(), eval_dataset=data()[:16], callbacks=[schedule])
    trainer.made = run.optimizer
    return trainer, schedule


def trained(
    run: Run, stage: int, base: Path, folder: Path, resume: Path | None = None, **options: Any
) -> dict[str, Any]:
    trainer, schedule = trainer_of(run, stage, base, folder, **options)
    dead = Dead(schedule)
    if stage and run.optimizer is None:
        trainer.add_callback(dead)
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return {**outcome(trainer, schedule, folder / "end"), "dead": dead.largest, "looked": dead.looked}


def outcome(trainer: Any, schedule: Any, folder: Path) -> dict[str, Any]:
    """Losses, what was done to ranks, and what ``save_model`` leaves."""
    trainer.save_model(folder)
    if distributed.is_initialized():
        distributed.barrier()
    log = trainer.state.log_history
    events = [
        (event.step, event.undone, [(layer.layer, layer.rank_before, layer.rank_after) for layer in event.layers])
        for event in schedule.history
    ]
    return {
        "losses": [row["loss"] for row in log if "loss" in row],
        "rates": [row["learning_rate"] for row in log if "learning_rate" in row],
        "events": events,
        "importance": [layer.importance for event in schedule.history for layer in event.layers],
        **stored(folder),
    }


def stored(folder: Path) -> dict[str, Any]:
    """What an adapter's folder holds: ranks, updates, and other tensors."""
    adapter = dynrank.read_adapter(folder)
    factors = {name: adapter.matrices(name) for name in adapter.layers}
    return {
        "ranks": {name: len(lora_A) for name, (_, lora_A) in factors.items()},
        "updates": {name: adapter.layers[name].scaling * (b @ a) for name, (b, a) in factors.items()},
        "others": {name: adapter.tensor(key) for name, key in adapter.others.items()},
    }


# Comparisons


def largest_difference(one: Sequence[float], other: Sequence[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def relative_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return max((float((one[name] - value).norm() / value.norm()) for name, value in other.items()), default=0.0)


def importance_difference(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Relative to the largest; 0 where nothing asked for it."""
    mine, theirs = (torch.tensor([value or 0.0 for value in each["importance"]]) for each in (one, other))
    return float((mine - theirs).abs().max() / theirs.abs().max().clamp_min(1e-30)) if len(theirs) else 0.0


def compared(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """How far a run is from the same one under DDP."""
    return {
        "ranks": "equal" if (one["events"], one["ranks"]) == (other["events"], other["ranks"]) else "differ",
        "loss": largest_difference(one["losses"], other["losses"]),
        "update": max(relative_difference(one[kind], other[kind]) for kind in ("updates", "others")),
        "importance": importance_difference(one, other),
        "rate": largest_difference(one["rates"], other["rates"]),
        "dead": one["dead"],
    }


def same_bits(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two runs have ended alike; the first may have begun later."""
    count = len(one["losses"])
    return (
        all(torch.equal(one[kind][n], v) for kind in ("updates", "others") for n, v in other[kind].items())
        and one["losses"] == other["losses"][-count:]
        and all(one[key] == other[key] for key in ("events", "ranks", "importance"))
    )


# Checks: each is what both processes do


def against_ddp(run: Run, stages: Sequence[int], base: Path, folder: Path) -> dict[int, Any]:
    expected = trained(run, 0, base, folder / "ddp")
    return {stage: compared(trained(run, stage, base, folder / f"zero{stage}"), expected) for stage in stages}


def resumed(run: Run, stages: Sequence[int], base: Path, folder: Path) -> dict[int, Any]:
    """{stage: {step of a checkpoint: whether it leads to the bits of the whole run, its ranks as stored}}."""
    found: dict[int, Any] = {}
    for stage in stages:
        place = folder / f"zero{stage}"
        whole = trained(run, stage, base, place, save_strategy="steps", save_steps=1)
        found[stage] = {}
        for step in SAVED:
            saved = place / f"checkpoint-{step}"
            again = trained(run, stage, base, place / f"again {step}", resume=saved)
            found[stage][step] = same_bits(again, whole), stored(saved)["ranks"]
    return found


def begin_without_cuda() -> None:
    """Let DeepSpeed use CPUs by torch alone: it would compile an extension for messages within a machine."""
    import deepspeed.comm.torch

    deepspeed.comm.torch.build_shm_op = lambda: None


def checks_of(names: Sequence[str], folder: Path) -> dict[str, Callable[[], Any]]:
    base = folder / "base"
    checks: dict[str, Callable[[], Any]] = {}
    for name, (run, stages) in RUNS.items():
        checks[name] = partial(against_ddp, run, stages, base, folder / name)
    for name, (run, stages) in RESUMED.items():
        checks[f"resumed, {name}"] = partial(resumed, run, stages, base, folder / f"resumed, {name}")
    return {name: checks[name] for name in names or checks}


def main(place: str, *names: str) -> None:
    """What one of two processes does, started as torchrun does: the checks of these names, or all."""
    warnings.simplefilter("ignore")
    begin_without_cuda()
    folder = Path(place)
    results: dict[str, Any] = {}
    keep(checks_of(names, folder), folder / f"{os.environ['RANK']}.pt", results)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
_ = (AdamW, Adafactor, ConfigurationError, PeftModel, itertools)
