"""Runs of transformers' Trainer whose ranks change, in one process or in two, where accelerate shards by FSDP2."""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import as_gpus
import torch
import transformers as hf
import wrapped_loops
from accelerate.state import AcceleratorState, GradientState
from ends import keep
from forked import free_port
from peft import LoraConfig, get_peft_model
from torch import distributed, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainingArguments
from transformers.distributed import DistributedConfig

import dynrank
from dynrank.callbacks import RankTrainerCallback
from dynrank.errors import ConfigurationError
from dynrank.schedules import How, Stage
from dynrank.targets import Budget, GrowTo, Rank
from dynrank.triggers import At

STEPS = 11
CHANGE = 6
# A checkpoint before the first change, one at it, and one after the second change.
SAVED = (3, CHANGE, 9)
SIZE = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def save_base(folder: Path) -> None:
    torch.manual_seed(0)
    hf.LlamaForCausalLM(hf.LlamaConfig(**SIZE, initializer_range=0.3)).save_pretrained(folder)


def loaded(folder: Path, **options: Any) -> Any:
    return hf.LlamaForCausalLM.from_pretrained(folder, **options)


def own(base: Any) -> Any:
    torch.manual_seed(0)
    return dynrank.add_lora(base, rank=8, alpha=8)


def peft(base: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    return get_peft_model(base, LoraConfig(r=8, lora_alpha=8, target_modules="all-linear", **options))


def with_head(base: Any) -> Any:
    return peft(base, modules_to_save=["lm_head"])


def nf4(storage: torch.dtype) -> dict[str, Any]:
    kind = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
    return {"quantization_config": hf.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_storage=storage, **kind)}


@dataclass
class Run:
    """A run; ``base`` is how its base is loaded, and ``fsdp`` the settings of FSDP2 in two processes."""

    make: Callable[[Any], Any] = peft
    stages: Any = field(default_factory=lambda: CUT_AND_GROWTH)
    base: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    fsdp: dict[str, Any] = field(default_factory=dict)
    # Process 0 alone reads the base; the other one has it on the meta device.
    is_sent: bool = False


HALF = [Stage(At(step=CHANGE), Budget(share=0.5))]
CUT_AND_GROWTH = [Stage(At(step=CHANGE), Budget(share=0.5), how=How(lr_factor="sqrt")), Stage(At(step=8), GrowTo(6))]
SHARDS = {"state_dict_type": "SHARDED_STATE_DICT"}
RUNS = {
    "accumulated": Run(
        with_head,
        HALF,
        trainer={"gradient_accumulation_steps": 2, "max_grad_norm": 0.1, "gradient_checkpointing": True},
    ),
    "undone": Run(stages=Stage(At(step=CHANGE), Rank(1), how=How(max_regression=0.001))),
    "kept gathered": Run(own, HALF, fsdp={"reshard_after_forward": False}),
    "nf4 in bytes": Run(stages=HALF, base=nf4(torch.uint8)),
    "nf4 in floats": Run(stages=HALF, base=nf4(torch.float32)),
    "in bfloat16": Run(with_head, HALF, trainer={"bf16": True}),
    "sent, peft": Run(stages=HALF, is_sent=True),
    "sent, own": Run(own, HALF, is_sent=True),
}
# Those whose checkpoints are resumed from, by the kind of these; and from which ones.
RESUMED = {
    "peft": (Run(), SAVED),
    # SGD has no state of its own.
    "own, shards": (Run(own, trainer={"optim": "sgd", "learning_rate": 1.0}, fsdp=SHARDS), SAVED[::2]),
    "own": (Run(own), SAVED[1:2]),
    "peft, shards": (Run(fsdp=SHARDS), SAVED[:1]),
}
# Those of which one process goes on from the last checkpoint.
IN_ONE = ("peft", "own, shards")
# Those whose models a model_init makes.
ANEW = ("peft", "peft, shards")
SCORED = {
    "metric_for_best_model": "score",
    "greater_is_better": True,
    "load_best_model_at_end": True,
    "eval_strategy": "steps",
    "eval_steps": 5,
}


def data() -> list[dict[str, Any]]:
    rows = torch.randint(40, (48, 6), generator=torch.Generator().manual_seed(1)).tolist()
    return [{"input_ids": row, "labels": row} for row in rows]


def trainer_of(
    run: Run,
    base: Path,
    folder: Path,
    callbacks: Any = None,
    kind: Any = TrainingArguments,
    anew: bool = False,
    **options: Any,
) -> tuple[Any, Any]:
    """(trainer, its callback) for the processes that there are; ``anew``: by a model_init."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    for name in [name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_"))]:
        del os.environ[name]
    settings: dict[str, Any] = {
        "max_steps": STEPS, "per_device_train_batch_size": 4 // processes, "per_device_eval_batch_size": 8 // processes,
        "learning_rate": 1e-2, "logging_steps": 1, "seed": 0, "use_cpu": True, "report_to": [], "disable_tqdm": True,
        "save_strategy": "no", "ddp_backend": "gloo" if "RANK" in os.environ else None,
    }  # fmt: skip
    if "RANK" in os.environ:
        settings |= {"fsdp": True, "fsdp_config": dict(run.fsdp)}
    arguments = kind(output_dir=str(folder), **settings | run.trainer | options)
    schedule = RankTrainerCallback(run.stages)
    place = "meta" if run.is_sent and os.environ.get("RANK") == "1" else "cpu"
    if place == "meta":
        with torch.device("meta"):
            model = run.make(hf.LlamaForCausalLM(hf.LlamaConfig.from_pretrained(base)))
    else:
        model = run.make(loaded(base, **run.base))
    assert {p.device.type for p in model.parameters()} == {place}
    made = Trainer(
        None if anew else model,
        arguments,
        model_init=(lambda: run.make(loaded(base, **run.base))) if anew else None,
        train_dataset=data(),
        eval_dataset=data()[:16],
        callbacks=[schedule] if callbacks is None else callbacks,
    )
    return made, schedule


def trained(run: Run, base: Path, folder: Path, resume: Path | None = None, **options: Any) -> tuple[Any, Any]:
    made, schedule = trainer_of(run, base, folder, **options)
    made.train(resume_from_checkpoint=str(resume) if resume else None)
    return made, schedule


def outcome(made: Any, schedule: Any) -> dict[str, Any]:
    """All that was trained, its optimizer state, and what was done to the ranks."""
    named = {name: p for name, p in made.model.named_parameters() if p.requires_grad}
    state = made.optimizer.optimizer.state
    return {
        "weights": {name: p.detach() for name, p in named.items()},
        "state": {n: {k: v for k, v in state[p].items() if isinstance(v, torch.Tensor)} for n, p in named.items()},
        "events": [
            (event.step, event.undone, [(la.layer, la.rank_before, la.rank_after) for la in event.layers])
            for event in schedule.history
        ],
        "importance": [la.importance for event in schedule.history for la in event.layers],
        "losses": [row["loss"] for row in made.state.log_history if "loss" in row],
        "shards": sum(isinstance(p, DTensor) for p in made.model.parameters()),
    }


# Two processes

CUT = Stage(At(step=CHANGE), Rank(3))


def whole(run: Run, base: Path, folder: Path) -> Any:
    made, schedule = trained(run, base, folder)
    return outcome(made, schedule)


def resumed(run: Run, steps: Sequence[int], base: Path, folder: Path) -> Any:
    """The run that nothing stops, what its checkpoints lead to, and what ``save_model`` has left."""
    made, schedule = trained(run, base, folder, save_strategy="steps", save_steps=steps[0])
    made.save_model(folder / "end")
    if distributed.get_rank() == 0:
        dynrank.save_adapter(made.model, folder / "by dynrank")
    ends = {"whole": outcome(made, schedule)}
    for step in steps:
        again = trained(run, base, folder / "again", resume=folder / f"checkpoint-{step}")
        ends[f"step {step}"] = outcome(*again)
    return ends


def with_tokens(base: Any) -> Any:
    """A model with three more tokens, whose rows each process draws by itself."""
    torch.manual_seed(int(os.environ["RANK"]))
    base.resize_token_embeddings(43, mean_resizing=False)
    return own(base)


def added_tokens(base: Path, folder: Path) -> dict[str, Any]:
    """The embeddings at the end of a run, after the Trainer and process 0 have saved the adapter."""
    made, _ = trained(Run(with_tokens, HALF), base, folder, save_strategy="steps", save_steps=STEPS)
    if distributed.get_rank() == 0:
        dynrank.save_adapter(made.model, folder / "by dynrank")
    state = {name: p.detach() for name, p in made.model.named_parameters() if not isinstance(p, DTensor)}
    return {name: value for name, value in state.items() if name in ("model.embed_tokens.weight", "lm_head.weight")}


def best(base: Path, folder: Path, rising: int) -> Any:
    """The step of the best model, the one before the cut if scores fall, and what was loaded at the end."""
    scores = itertools.count(0, rising)
    made, schedule = trainer_of(Run(stages=CUT), base, folder, save_strategy="steps", save_steps=5, **SCORED)
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


def attached(base: Path, folder: Path) -> Any:
    """The callback comes after the Trainer is made, and the run goes on from a checkpoint of after the cut."""
    made, schedule = trainer_of(RESUMED["peft, shards"][0], base, folder / "again", callbacks=[])
    schedule.attach(made)
    made.train(resume_from_checkpoint=str(folder / f"checkpoint-{SAVED[-1]}"))
    return outcome(made, schedule)


def anew(name: str, base: Path, folder: Path) -> list[Any]:
    """The Trainer makes a model for each training: for a whole one, and to go on from a checkpoint of after the cut."""
    made, schedule = trainer_of(RESUMED[name][0], base, folder / "anew", anew=True)
    ends = []
    for start in (None, folder / f"checkpoint-{SAVED[-1]}"):
        made.train(resume_from_checkpoint=str(start) if start else None)
        ends.append(outcome(made, schedule))
    return ends


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
    model = dynrank.add_lora(nn.Sequential(nn.Linear(6, 12)), rank=4, alpha=4)
    dynrank.resize(
        FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu")), 2, optimizers=()
    )


def by_accelerate_alone() -> None:
    model = dynrank.add_lora(nn.Sequential(nn.Linear(6, 12)), rank=4, alpha=4)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    accelerator = wrapped_loops.accelerator_of_fsdp2()
    model, optimizer = accelerator.prepare(model, optimizer)
    dynrank.resize(model, 2, optimizers=[optimizer])


def main(place: str) -> None:
    """What one of two processes does, started as torchrun does: every run, every resume, every refusal."""
    folder = Path(place)
    base = folder / "base"
    process = int(os.environ["RANK"])
    warnings.simplefilter("ignore")
    as_gpus.pretend()
    checks = {name: partial(whole, run, base, folder / name) for name, run in RUNS.items()}
    for name, (run, steps) in RESUMED.items():
        checks[f"resume {name}"] = partial(resumed, run, steps, base, folder / f"resume {name}")
    checks["added tokens"] = partial(added_tokens, base, folder / "added tokens")
    checks["best, before"] = partial(best, base, folder / "best, before", -1)
    checks["best, after"] = partial(best, base, folder / "best, after", 1)
    checks["by transformers"] = partial(by_transformers, base, folder / "by transformers")
    for name in ANEW:
        checks[f"anew, {name}"] = partial(anew, name, base, folder / f"resume {name}")
    checks["attached"] = partial(attached, base, folder / "resume peft, shards")
    for way in wrapped_loops.SHARDED:
        checks[f"loop, {way}"] = partial(wrapped_loops.ended, way, process, 2)
    for name, options in {
        "FSDP1": {"fsdp_config": {"version": 1, "sync_module_states": False}},
        "activation checkpointing": {"fsdp_config": {"activation_checkpointing": True}},
        "vLLM": {"kind": OfVLLM},
        "best of shards": {"fsdp_config": dict(SHARDS), "save_strategy": "steps", "save_steps": 5} | SCORED,
    }.items():
        checks[f"refused, {name}"] = partial(
            refused, partial(trainer_of, RESUMED["peft"][0], base, folder / name, **options)
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
