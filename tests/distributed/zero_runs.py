"""Runs of transformers' Trainer whose ranks change, under DDP and under DeepSpeed's ZeRO; the same in both."""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from accelerate.state import AcceleratorState, GradientState
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, distributed, nn
from transformers import Trainer, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

import dynrank
from dynrank.callbacks import RankTrainerCallback
from dynrank.errors import ConfigurationError
from dynrank.schedules import How, Stage, early_budget
from dynrank.targets import Budget, GrowTo, Rank
from dynrank.triggers import At

STEPS = 12
CHANGE = 5
RANK = 7
# Factors whose sizes two processes cannot share evenly: 7 rows of 25 numbers.
SIZE = {"vocab_size": 40, "hidden_size": 20, "intermediate_size": 25, "num_hidden_layers": 2, "num_attention_heads": 2}
LAYERS = ["q_proj", "up_proj", "down_proj"]


def save_base(folder: Path) -> None:
    torch.manual_seed(0)
    hf.LlamaForCausalLM(hf.LlamaConfig(**SIZE, initializer_range=0.3)).save_pretrained(folder)


def peft(base: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    return get_peft_model(base, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=LAYERS, **options))


def with_head(base: Any) -> Any:
    return peft(base, modules_to_save=["lm_head"])


def with_embedding(base: Any) -> Any:
    torch.manual_seed(0)
    return get_peft_model(base, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=[*LAYERS, "embed_tokens"]))


def own(base: Any) -> Any:
    torch.manual_seed(0)
    return dynrank.add_lora(base, rank=RANK, alpha=RANK, target_modules=LAYERS)


CUT = Stage(At(step=CHANGE), Rank(3), how=How(lr_factor="sqrt"))
PLAIN_CUT = replace(CUT, how=How())


@dataclass
class Run:
    """A run; ``trainer`` are arguments of the Trainer, and ``zero`` settings of ds.json."""

    make: Callable[[Any], Any] = peft
    stages: Any = CUT
    trainer: dict[str, Any] = field(default_factory=dict)
    zero: dict[str, Any] = field(default_factory=dict)
    base: dict[str, Any] = field(default_factory=dict)
    # Class and arguments; None: the Trainer's own AdamW.
    optimizer: tuple[Any, dict[str, Any]] | None = None
    # The base is partitioned when it is loaded.
    partitioned: bool = False


def data() -> list[dict[str, Any]]:
    rows = torch.randint(40, (96, 6), generator=torch.Generator().manual_seed(1)).tolist()
    return [{"input_ids": row, "labels": row} for row in rows]


def settings(stage: int, run: Run) -> dict[str, Any]:
    """The content of ds.json."""
    zero: dict[str, Any] = {"stage": stage}
    if stage == 3:
        zero |= {"stage3_gather_16bit_weights_on_model_save": True, "stage3_param_persistence_threshold": 0}
    auto = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    rest = {key: value for key, value in run.zero.items() if key != "zero_optimization"}
    zero |= run.zero.get("zero_optimization", {})
    return {"zero_optimization": zero, "bf16": {"enabled": "auto"}, **dict.fromkeys(auto, "auto"), **rest}


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


def forget_state() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    unset_hf_deepspeed_config()
    for name in [name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_"))]:
        del os.environ[name]


def trainer_of(run: Run, stage: int, base: Path, folder: Path, **options: Any) -> tuple[Any, Any]:
    """(trainer, its callback); stage 0 is DDP, or one process without anything."""
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
    arguments = TrainingArguments(output_dir=str(folder), **given | run.trainer | options)
    model = run.make(hf.LlamaForCausalLM.from_pretrained(base, **run.base))
    schedule = RankTrainerCallback(run.stages, evaluate=lambda: made.evaluate())
    made = OptimizerTrainer(model, arguments, train_dataset=data(), eval_dataset=data()[:16], callbacks=[schedule])
    made.made = run.optimizer
    return made, schedule


def trained(
    run: Run, stage: int, base: Path, folder: Path, resume: Path | None = None, **options: Any
) -> dict[str, Any]:
    made, schedule = trainer_of(run, stage, base, folder, **options)
    made.train(resume_from_checkpoint=str(resume) if resume else None)
    return outcome(made, schedule, folder / "end")


def outcome(made: Any, schedule: Any, folder: Path) -> dict[str, Any]:
    """Losses, what was done to ranks, and what ``save_model`` leaves."""
    made.save_model(folder)
    if distributed.is_initialized():
        distributed.barrier()
    adapter = dynrank.read_adapter(folder)
    layers = adapter.layers.items()
    return {
        "losses": [row["loss"] for row in made.state.log_history if "loss" in row],
        "rates": [row["learning_rate"] for row in made.state.log_history if "learning_rate" in row],
        "events": [
            (e.step, e.undone, [(a.layer, a.rank_before, a.rank_after) for a in e.layers]) for e in schedule.history
        ],
        "importance": [a.importance for e in schedule.history for a in e.layers],
        "ranks": {name: layer.stored_rank for name, layer in layers},
        "updates": {name: layer.scaling * (b @ a) for name, layer in layers for b, a in [adapter.factors(name)]},
        "others": {name: adapter.tensor(key) for name, key in adapter.others.items()},
    }


def main(place: str) -> None:
    folder = Path(place)
    base = folder / "base"
    warnings.simplefilter("ignore")
    run = Run()
    for stage in (0, 1, 2, 3):
        end = trained(run, stage, base, folder / f"stage {stage}")
        if stage == 0:
            expected = end
        if os.environ["RANK"] == "0":
            print(stage, end["events"], end["ranks"])
            print(max(abs(a - b) for a, b in zip(end["losses"], expected["losses"])), end["losses"])
            print(max(float((end["updates"][n] - v).norm() / v.norm()) for n, v in expected["updates"].items()))
            print(end["rates"])
            print(end["importance"], expected["importance"])
