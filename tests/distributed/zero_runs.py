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
from importlib import import_module
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers as hf
from accelerate.state import AcceleratorState, GradientState
from datasets import Dataset
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

# Before DeepSpeed is imported, which would look for a GPU.
os.environ.setdefault("DS_ACCELERATOR", "cpu")

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


def peft(base: Any, layers: Sequence[str] = LAYERS, r: int = RANK, **options: Any) -> Any:
    torch.manual_seed(0)
    return get_peft_model(base, LoraConfig(r=r, lora_alpha=r, target_modules=[*layers], **options))


def with_head(base: Any) -> Any:
    return peft(base, modules_to_save=["lm_head"])


def apart(parameters: list[Any], **options: Any) -> Optimizer:
    """AdamW with the factors in a group of their own, as the error of a shared group says."""
    own = [parameter for parameter in parameters if parameter.shape != (SIZE["vocab_size"], SIZE["hidden_size"])]
    ids = {id(parameter) for parameter in own}
    rest = [parameter for parameter in parameters if id(parameter) not in ids]
    return AdamW([{"params": own}, {"params": rest}], **options)


def in_one_process(base: Any) -> Any:
    """Adapters that are less than half of what is trained, and come first: ZeRO-1 and 2 have them in one process."""
    return peft(base, ["q_proj"], modules_to_save=["lm_head"])


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
    # What makes it of parameters, and further arguments; None: the Trainer's own AdamW.
    optimizer: tuple[Callable[..., Optimizer], dict[str, Any]] | None = None
    # Whether DeepSpeed's own functions read the right parameters.
    readable: bool = True
    # ZeRO-3 partitions the base when it is loaded (zero.Init).
    partitioned: bool = False


ACCUMULATED = {"gradient_accumulation_steps": 2}
OFFLOADED = {"offload_optimizer": {"device": "cpu"}}
BOTH_OFFLOADED = {**OFFLOADED, "offload_param": {"device": "cpu"}}
# accelerate takes DeepSpeed's own Adam instead of torch's only if that is not forbidden.
BY_TORCH = {"zero_force_ds_cpu_optimizer": False}
# As LLaMA-Factory and axolotl set them in their examples.
BUCKETS = {"contiguous_gradients": True, "reduce_bucket_size": "auto", "overlap_comm": True}
ROUND_ROBIN = {**BUCKETS, "reduce_bucket_size": 5e8, "allgather_bucket_size": 5e8, "round_robin_gradients": True}
THIRD = {
    **BUCKETS,
    "sub_group_size": 1e9,
    "stage3_prefetch_bucket_size": "auto",
    "stage3_max_live_parameters": 1e9,
    "stage3_param_persistence_threshold": "auto",
    "stage3_max_reuse_distance": 1e9,
}
ITS_ADAM = {"type": "AdamW", "params": dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")}
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
    "buckets in turn": (Run(stages=HALF, zero={"zero_optimization": ROUND_ROBIN}, readable=False), (2,)),
    "buckets, automatic": (Run(stages=HALF, zero={"zero_optimization": THIRD}), (3,)),
    "FusedAdam of ds.json": (Run(stages=HALF, zero={"optimizer": ITS_ADAM}), (1, 2, 3)),
    "DeepSpeedCPUAdam": (Run(stages=HALF, zero={"zero_optimization": OFFLOADED}), (2, 3)),
    "a head": (Run(with_head, PLAIN_CUT), (1, 2, 3)),
    "a head in a group of its own": (Run(with_head, HALF, optimizer=(apart, {"lr": 1e-2})), (1, 2, 3)),
    "adapters of one process": (Run(in_one_process, replace(HALF, how=How())), (1, 2, 3)),
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
    # It multiplies beta ** t from step to step, and takes a power after a resume, whose last bit may differ.
    "DeepSpeedCPUAdam": (Run(stages=HALF, zero={"zero_optimization": OFFLOADED}), (2, 3)),
    "FusedAdam of ds.json": (Run(stages=HALF, zero={"optimizer": ITS_ADAM}), (2, 3)),
    "in bfloat16": (Run(stages=HALF, trainer={"bf16": True}), (1, 2, 3)),
    "add_lora": (Run(own, HALF), (1, 2, 3)),
    "a head": (Run(with_head, replace(HALF, how=How())), (2, 3)),
    "adapters of one process": (Run(in_one_process, replace(HALF, how=How())), (2,)),
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
        make, options = self.made
        if self.optimizer is None:
            self.optimizer = make([p for p in self.model.parameters() if p.requires_grad], **options)
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


class SaveAt(TrainerCallback):  # type: ignore[misc]
    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_save = state.global_step in SAVED


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
    schedule = RankTrainerCallback(run.stages)
    trainer = OptimizerTrainer(model, arguments, train_dataset=data(), eval_dataset=data()[:16], callbacks=[schedule])
    trainer.made = run.optimizer
    return trainer, schedule


def trained(
    run: Run, stage: int, base: Path, folder: Path, resume: Path | None = None, *, saves: bool = False
) -> dict[str, Any]:
    trainer, schedule = trainer_of(run, stage, base, folder)
    if saves:
        trainer.add_callback(SaveAt())
    dead = Dead(schedule)
    if stage and run.optimizer is None and run.readable:
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
        "rates": [row[name] for row in log for name in ("learning_rate", "lr/adapter") if name in row],
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
        # An embedding below an adapter is frozen, and not in every file.
        "others": {name: adapter.tensor(key) for name, key in adapter.others.items() if "base_layer" not in name},
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
    """{stage: {step of a checkpoint: (whether it leads to the bits of the whole run, its ranks as stored)}}."""
    found: dict[int, Any] = {}
    for stage in stages:
        place = folder / f"zero{stage}"
        whole = trained(run, stage, base, place, saves=True)
        found[stage] = {}
        for step in SAVED:
            saved = place / f"checkpoint-{step}"
            again = trained(run, stage, base, place / f"again {step}", resume=saved)
            found[stage][step] = same_bits(again, whole), sorted({*stored(saved)["ranks"].values()})
    return found


def best(stages: Sequence[int], rising: int, base: Path, folder: Path) -> dict[int, Any]:
    """{stage: (step of the best model, whether what is saved at the end is it to the bit)}; scores rise or fall."""
    found = {}
    scored = {"metric_for_best_model": "score", "greater_is_better": True, "load_best_model_at_end": True}
    often = {"eval_strategy": "steps", "eval_steps": 4, "save_strategy": "steps", "save_steps": 4}
    for stage in stages:
        scores = itertools.count(0, rising)
        place = folder / f"zero{stage}"
        trainer, schedule = trainer_of(Run(), stage, base, place, **scored, **often)
        schedule.keep_best_before = True
        trainer.compute_metrics = partial(lambda scores, _: {"score": float(next(scores))}, scores)
        trainer.train()
        end = outcome(trainer, schedule, place / "end")
        step = trainer.state.best_global_step
        saved = stored(place / f"checkpoint-{step}")
        alike = all(torch.equal(end["updates"][name], value) for name, value in saved["updates"].items())
        found[stage] = step, alike and end["ranks"] == saved["ranks"], sorted({*end["ranks"].values()})
    return found


def read_by_peft(make: Callable[[Any], Any], stages: Sequence[int], base: Path, folder: Path) -> dict[int, Any]:
    """{stage: (largest difference of a logit between the trained model and what PEFT reads, ranks that it reads)}."""
    found = {}
    inputs = torch.tensor([row["input_ids"] for row in data()[:4]])
    for stage in stages:
        trainer, schedule = trainer_of(Run(make, replace(HALF, how=How())), stage, base, folder / f"zero{stage}")
        trainer.train()
        trainer.model_wrapped.eval()
        with torch.no_grad():
            logits = trainer.model_wrapped(input_ids=inputs).logits
        place = folder / f"zero{stage}" / "end"
        outcome(trainer, schedule, place)
        forget_state()
        read = PeftModel.from_pretrained(hf.LlamaForCausalLM.from_pretrained(base), place).eval()
        with torch.no_grad():
            difference = float((read(input_ids=inputs).logits - logits).abs().max())
        found[stage] = difference, {name: layer.rank for name, layer in dynrank.lora_layers(read)}
    return found


def by_trl(stages: Sequence[int], base: Path, folder: Path) -> dict[int, Any]:
    """SFTTrainer with an int as the schedule, beside the same under DDP."""
    from trl import SFTConfig, SFTTrainer

    ends = {}
    for stage in (0, *stages):
        forget_state()
        arguments = SFTConfig(
            str(folder / f"zero{stage}"), max_steps=STEPS, per_device_train_batch_size=2, learning_rate=1e-2,
            logging_steps=1, use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no", ddp_backend="gloo",
            bf16=False, gradient_checkpointing=True, deepspeed=settings(stage, Run()) if stage else None,
        )  # fmt: skip
        torch.manual_seed(0)
        schedule = RankTrainerCallback(4)
        trainer = SFTTrainer(
            hf.LlamaForCausalLM.from_pretrained(base),
            arguments,
            train_dataset=Dataset.from_list(data()),
            peft_config=LoraConfig(r=RANK, lora_alpha=RANK, target_modules=LAYERS),
            processing_class=tokenizer(),
            callbacks=[schedule],
        )
        trainer.train()
        ends[stage] = {**outcome(trainer, schedule, folder / f"zero{stage}" / "end"), "dead": 0.0}
    return {stage: compared(ends[stage], ends[0]) for stage in stages}


def tokenizer() -> Any:
    """Its words are the numbers of the rows; TRL wants one."""
    words = {str(number): number for number in range(40)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="0"))
    return hf.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="0", eos_token="0")


class Rates(TrainerCallback):  # type: ignore[misc]
    """The rate of each step as the optimizer takes it."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, optimizer: Any, **_: Any) -> None:
        if not state.global_step:
            inner = optimizer.optimizer.optimizer
            inner.register_step_pre_hook(lambda inner, *_: self.seen.append(float(inner.param_groups[0]["lr"])))


def rates_that_step(zero: dict[str, Any], stage: int, base: Path, folder: Path) -> dict[int, Any]:
    """{step: the rate that was used, as a multiple of that without a factor}, for a factor of 2 after the change."""
    seen = []
    for factor in (1.0, 2.0):
        run = Run(stages=replace(CUT, how=How(lr_factor=factor)), zero=zero)
        trainer, _ = trainer_of(run, stage, base, folder / f"{factor}")
        rates = Rates()
        trainer.add_callback(rates)
        trainer.train()
        seen.append(rates.seen)
    return {step: b / a if a else None for step, (a, b) in enumerate(zip(*seen, strict=True))}


def padded_beside_real(stages: Sequence[int], base: Path, folder: Path) -> dict[int, Any]:
    """{stage: largest difference of a loss} in bfloat16: rank 3 beside rank 7 whose other directions are zero.

    Both have float32 masters of the same values, which bfloat16 holds exactly; no schedule runs.
    """

    def made(rank: int, model: Any) -> Any:
        torch.manual_seed(0)
        adapted = get_peft_model(model, LoraConfig(r=rank, lora_alpha=rank, target_modules=LAYERS))
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for _, layer in dynrank.lora_layers(adapted):
                for factor in (layer.lora_A, layer.lora_B):
                    factor.zero_()
                layer.lora_A[:3] = torch.randn(3, layer.d_in, generator=generator).bfloat16() / 4
                layer.lora_B[:, :3] = torch.randn(layer.d_out, 3, generator=generator).bfloat16() / 4
        return adapted

    found = {}
    for stage in stages:
        losses = []
        for rank in (3, RANK):
            forget_state()
            run = Run(partial(made, rank), [Stage(At(step=STEPS), Rank(rank))], trainer={"bf16": True})
            trainer, _ = trainer_of(run, stage, base, folder / f"zero{stage}, {rank}")
            trainer.callback_handler.callbacks = [
                c for c in trainer.callback_handler.callbacks if not isinstance(c, RankTrainerCallback)
            ]
            trainer.train()
            losses.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
        found[stage] = largest_difference(*losses)
    return found


def refused(make: Callable[[], Any]) -> dict[str, str]:
    try:
        make()
    except ConfigurationError as error:
        return {"": str(error)}
    return {"": "not refused"}


def train(run: Run, stage: int, base: Path, folder: Path, **options: Any) -> None:
    trainer_of(run, stage, base, folder, **options)[0].train()


def in_plain_loop(base: Path) -> None:
    """``dynrank.resize`` of what DeepSpeed trains, without the Trainer."""
    import deepspeed

    model = peft(hf.LlamaForCausalLM.from_pretrained(base))
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad])
    config = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 2}}
    deepspeed.initialize(model=model, optimizer=optimizer, config={**config, "zero_allow_untested_optimizer": True})
    dynrank.resize(model, 3, optimizers=[optimizer])


class Lion(Optimizer):
    """Moves every number by the rate, also where the gradient is zero."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    def step(self, closure: Any = None) -> None:
        raise AssertionError("no step should be made")


# {name: (run, stage of ZeRO, words of the message)}
REFUSED: dict[str, tuple[Run, int, str]] = {
    "a head, and a raised rate": (Run(with_head), 2, "in create_optimizer of a derived class"),
    "growth above the first rank": (Run(stages=[Stage(At(step=2), GrowTo(8))]), 2, "above the first rank"),
    "reset": (Run(stages=replace(CUT, how=How(optimizer_state="reset"))), 2, 'optimizer_state="transport"'),
    "Lion": (Run(optimizer=(Lion, {"lr": 0.1})), 2, ".Lion"),
    "Adafactor": (Run(optimizer=(Adafactor, {"lr": 0.1})), 3, "got torch.Adafactor"),
    "Muon": (Run(optimizer=(torch.optim.Muon, {"lr": 0.1})), 3, "got torch.Muon"),
    "stage 0": (Run(zero={"zero_optimization": {"stage": 0}}), 1, "set 1, 2 or 3"),
    "nothing is gathered": (
        Run(zero={"zero_optimization": {"stage3_gather_16bit_weights_on_model_save": False}}), 3, "set it to true",
    ),
    "fp16": (Run(zero={"fp16": {"enabled": True}, "bf16": {"enabled": False}}), 2, "set bf16"),
    "NVMe": (Run(zero={"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}), 3, "set cpu or none"),
    "ZeRO++": (Run(zero={"zero_optimization": {"zero_hpz_partition_size": 2}}), 3, "ZeRO++"),
    "ZeRO++, weights": (Run(zero={"zero_optimization": {"zero_quantized_weights": True}}), 3, "ZeRO++"),
    "MiCS": (Run(zero={"zero_optimization": {"mics_shard_size": 2}}), 3, "MiCS"),
    "tensor parallel": (Run(zero={"tensor_parallel": {"autotp_size": 2}}), 2, "tensor parallelism"),
    "ZenFlow": (Run(zero={"zero_optimization": {"zenflow": {"topk_ratio": 0.1}}}), 2, "zenflow"),
}  # fmt: skip
ALONE = "one process"
BY_DEEPSPEED = {
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto", "torch_adam": True}},
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": {
            "total_num_steps": "auto", "warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"
        },
    },
}  # fmt: skip


def begin_without_cuda() -> None:
    """Let DeepSpeed use CPUs by torch alone: it would compile an extension for messages within a machine."""
    # As an attribute of its package, `torch` is torch itself.
    import_module("deepspeed.comm.torch").build_shm_op = lambda: None


def checks_of(names: Sequence[str], folder: Path) -> dict[str, Callable[[], Any]]:
    base = folder / "base"
    checks: dict[str, Callable[[], Any]] = {}
    for name, (run, stages) in RUNS.items():
        checks[name] = partial(against_ddp, run, stages, base, folder / name)
    for name, (run, stages) in RESUMED.items():
        checks[f"resumed, {name}"] = partial(resumed, run, stages, base, folder / f"resumed, {name}")
    checks["best, before the cut"] = partial(best, (2, 3), -1, base, folder / "best, before")
    checks["best, after the cut"] = partial(best, (2, 3), 1, base, folder / "best, after")
    for name, make in {"PEFT's": peft, "PEFT's, a head": with_head, "add_lora's": own}.items():
        checks[f"read by PEFT, {name}"] = partial(read_by_peft, make, (1, 2, 3), base, folder / f"read, {name}")
    checks["TRL"] = partial(by_trl, (1, 2, 3), base, folder / "TRL")
    for name, zero in {"ds.json": BY_DEEPSPEED, "ds.json, optimizer": {"optimizer": BY_DEEPSPEED["optimizer"]}}.items():
        for stage in (2, 3):
            checks[f"rates by {name}, {stage}"] = partial(rates_that_step, zero, stage, base, folder / name)
    checks["bfloat16, padded beside real"] = partial(padded_beside_real, (1, 2, 3), base, folder / "padded")
    for name, (run, stage, _) in REFUSED.items():
        checks[f"refused, {name}"] = partial(refused, partial(train, run, stage, base, folder / "refused"))
    checks["refused, plain loop"] = partial(refused, partial(in_plain_loop, base))
    if os.environ["WORLD_SIZE"] == "1":
        checks = {ALONE: partial(against_ddp, Run(stages=HALF), (1, 2, 3), base, folder / ALONE)}
    return {name: check for name, check in checks.items() if not names or name in names}


def main(place: str, *names: str) -> None:
    """What each process does, started as torchrun does: the checks of these names, or all of so many processes."""
    warnings.simplefilter("ignore")
    begin_without_cuda()
    folder = Path(place)
    results: dict[str, Any] = {}
    file = folder / f"{os.environ['RANK']}.pt"
    keep(checks_of(names, folder), file, results)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
