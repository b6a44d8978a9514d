"""Runs whose ranks change, by one process or by two, which come to the same adapter; and all that two have to do."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import torch
from ends import keep
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from peft import LoraConfig, get_peft_model
from torch import distributed, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, TensorDataset, default_collate
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock
from wrapped_loops import LOADED, WAYS, ended, gradients, sparse_gradients

import dynrank
from dynrank.app.tasks.loader import ResumableLoader, evaluation_batches
from dynrank.callbacks import AdapterCheckpoint, BestWeights, RankScheduler
from dynrank.distributed.processes import from_all, from_first
from dynrank.distributed.sharding import shard_frozen
from dynrank.errors import ConfigurationError
from dynrank.schedules import How, Stage, auto
from dynrank.targets import Budget, GrowTo, Rank
from dynrank.triggers import At, Plateau

STEPS = 22
CHANGE = 12
PARAMETERS = ["experts.gate_up_proj", "experts.down_proj", "gate.weight"]
PATIENCE = timedelta(seconds=60)


class Experts(nn.Module):
    """Four experts, two of them for each row, and their router."""

    def __init__(self) -> None:
        super().__init__()
        size = {"hidden_size": 24, "moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
        self.mlp = Qwen3MoeSparseMoeBlock(Qwen3MoeConfig(**size, experts_implementation="grouped_mm"))
        for weight in self.mlp.parameters():
            nn.init.normal_(weight, std=0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp(x[:, None])[:, 0]


class Model(lightning.LightningModule):
    """LoRA layers and a head that is trained whole; 8 examples a step, over all processes."""

    def __init__(self, *, peft: bool = False, idle: bool = False, experts: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        middle = Experts() if experts else nn.Linear(24, 24)
        net = nn.Sequential(nn.Linear(12, 24), nn.Tanh(), middle, nn.Tanh(), nn.Linear(24, 6))
        modules = ["0"] if experts else ["0", "2"]
        parameters = PARAMETERS if experts else []
        if peft:
            config = LoraConfig(
                r=6, lora_alpha=12, target_modules=modules, target_parameters=parameters, modules_to_save=["4"]
            )
            self.net: nn.Module = get_peft_model(net, config)
        else:
            targets = [*modules, *parameters]
            self.net = dynrank.add_lora(
                net,
                rank=6,
                rank_map={r"gate\.weight": 3} if experts else None,
                alpha=12,
                target_modules=targets,
                modules_to_save=["4"],
            )
        if idle:
            # This parameter is in no loss, so DDP has to look for it.
            self.idle = nn.Parameter(torch.zeros(3))

    def configure_model(self) -> None:
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            assert self.device_mesh is not None
            layers = [layer.module for _, layer in dynrank.lora_layers(self.net)]
            blocks = [module for module in self.net.modules() if isinstance(module, Experts)] or layers
            shard_frozen(self.net, self.device_mesh["data_parallel"], blocks=blocks)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = batch
        return nn.functional.mse_loss(self.net(x), y)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        # The value is that of this process alone, because nothing is synchronised.
        self.log("val/loss", nn.functional.mse_loss(self.net(x), y))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)

    @property
    def data(self) -> TensorDataset:
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(80, 12, generator=generator)
        return TensorDataset(x, x @ torch.randn(12, 6, generator=generator))

    def train_dataloader(self) -> ResumableLoader:
        share = self.trainer.global_rank, self.trainer.world_size
        return ResumableLoader(self.data, [1] * 80, 8 // share[1], 3, default_collate, share=share)

    def val_dataloader(self) -> DataLoader[Any]:
        share = self.trainer.global_rank, self.trainer.world_size
        return DataLoader(self.data, batch_sampler=evaluation_batches(80, 40 // share[1], share))


@dataclass
class Run:
    """A run: its schedule, and the options of the model, of the trainer and of its strategy in two processes."""

    stages: Any = field(default_factory=lambda: Stage(At(step=CHANGE), Rank(3)))
    model: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    # None stands for FSDP2.
    ddp: dict[str, Any] | None = field(default_factory=dict)


HALF = Stage(At(step=CHANGE), Budget(share=0.5))
UNDONE = Stage(At(step=CHANGE), Rank(1), how=How(max_regression=0.01))
RUNS = {
    "ddp": Run(),
    "ddp, unused parameters": Run(model={"idle": True}, ddp={"find_unused_parameters": True}),
    "ddp, accumulation and clipping": Run(
        HALF, trainer={"accumulate_grad_batches": 2, "gradient_clip_val": 0.3}, ddp={"gradient_as_bucket_view": True}
    ),
    "ddp, auto": Run(auto(0.05, at=0.5)),
    "ddp, growth at random, then shrink": Run([Stage(At(step=6), GrowTo(9)), Stage(At(step=CHANGE), Rank(2))]),
    "ddp, undone": Run(UNDONE, ddp={"static_graph": True}),
    "ddp, experts": Run(HALF, model={"experts": True}),
    "ddp, peft, experts": Run(HALF, model={"experts": True, "peft": True}),
    "fsdp2": Run(trainer={"accumulate_grad_batches": 2, "gradient_clip_val": 0.3}, ddp=None),
    "fsdp2, undone": Run(UNDONE, ddp=None),
    "fsdp2, experts": Run(HALF, model={"experts": True}, ddp=None),
}

ONE_FILE = {"save_distributed_checkpoint": False}
# Steps whose checkpoints are resumed from: before the change, at it and after it.
BEFORE = CHANGE - 4
AT = CHANGE
AFTER = CHANGE + 4
PLATEAU = Stage(Plateau(patience=2, min_delta=0.5), Rank(3), deadline=0.9)
# Each has a run, those steps, what else its strategy is told, and the kind of its checkpoints.
RESUMED = {
    "ddp, budget": (Run(HALF), (BEFORE, AT, AFTER), {}),
    "ddp, peft": (Run(model={"peft": True}), (AFTER,), {}),
    "ddp, plateau": (Run(PLATEAU), (BEFORE,), {"kind": AdapterCheckpoint}),
    "fsdp2, budget": (Run(HALF, ddp=None), (BEFORE, AT, AFTER), ONE_FILE),
    "fsdp2, a folder": (Run(HALF, ddp=None), (AT,), {"save_distributed_checkpoint": True}),
    "fsdp2, without the base": (Run(HALF, ddp=None), (BEFORE, AFTER), ONE_FILE | {"kind": AdapterCheckpoint}),
    "fsdp2, peft": (Run(model={"peft": True}, ddp=None), (AFTER,), ONE_FILE | {"kind": AdapterCheckpoint}),
}

# One run takes place in different processes; each has what it is there, and the folder of its checkpoints.
CROSSED = {
    "one process": (RESUMED["ddp, budget"][0], "one process"),
    "ddp": (RESUMED["ddp, budget"][0], "ddp, budget"),
    "fsdp2": (RESUMED["fsdp2, budget"][0], "fsdp2, budget"),
}
# Before the change and after it.
CROSSINGS = [BEFORE, AFTER]


def strategy_of(run: Run, **options: Any) -> Any:
    if run.ddp is None:
        return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, timeout=PATIENCE, **options)
    return DDPStrategy(**run.ddp, timeout=PATIENCE, **options)


def saving(folder: Path, kind: Any = ModelCheckpoint) -> dict[str, Any]:
    """Options of :func:`fit`: a checkpoint of each fourth step, by a callback of this kind."""
    every = kind(folder, filename="{step}", every_n_train_steps=4, save_top_k=-1)
    return {"callbacks": [every], "enable_checkpointing": True}


def saved(folder: Path, step: int) -> Path:
    return folder / f"step={step}.ckpt"


def fit(
    run: Run, *, strategy: Any = "auto", devices: int = 1, callbacks: Any = (), ckpt_path: Any = None, **options: Any
) -> tuple[Model, lightning.Trainer, RankScheduler]:
    """One training of ``run``."""
    model = Model(**run.model)
    scheduler = RankScheduler(run.stages)
    settings: dict[str, Any] = {
        "accelerator": "cpu", "devices": devices, "strategy": strategy, "max_steps": STEPS, "logger": False,
        "val_check_interval": 4, "check_val_every_n_epoch": None, "num_sanity_val_steps": 0,
        "enable_progress_bar": False, "enable_model_summary": False, "use_distributed_sampler": False,
        "enable_checkpointing": False,
    }  # fmt: skip
    trainer = lightning.Trainer(**settings | run.trainer | options, callbacks=[*callbacks, scheduler])
    trainer.fit(model, ckpt_path=ckpt_path)
    return model, trainer, scheduler


def outcome(model: Model, trainer: lightning.Trainer, scheduler: RankScheduler) -> dict[str, Any]:
    """All that was trained, its optimizer state, and what was done to the ranks."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    state = trainer.optimizers[0].state
    return {
        "weights": {name: p.detach() for name, p in trained.items()},
        "state": {n: {k: v for k, v in state[p].items() if isinstance(v, torch.Tensor)} for n, p in trained.items()},
        "events": [
            (event.step, event.undone, [(la.rank_before, la.rank_after) for la in event.layers])
            for event in scheduler.history
        ],
        "shards": [name for name, p in model.named_parameters() if isinstance(p, DTensor)],
        "predicted": [la.predicted_error for event in scheduler.history for la in event.layers],
        "importance": [la.importance for event in scheduler.history for la in event.layers],
    }


# Two processes


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


class OwnScore(lightning.Callback):
    """Logs a score that is best at one of the first validations in process 0, and in the mean at the last one."""

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        score = -trainer.global_step if trainer.global_rank == 0 else 3 * trainer.global_step
        self.log("score", float(score))


def best_of_own_scores(run: Run) -> tuple[int | None, float]:
    """The step and the value of the best weights, where processes do not average what they log."""
    best = BestWeights("score", "max")
    callbacks = [OwnScore(), best]
    fit(run, strategy=strategy_of(run), devices=2, callbacks=callbacks, enable_checkpointing=True)
    return best.step, best.value


def main(place: str) -> None:
    """What one of two processes does, started as torchrun does: every run, every resume, every refusal."""
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
    for error in (KeyboardInterrupt("stop"), ConfigurationError("bad"), Unpicklable("a", "b")):
        checks[f"raised {type(error).__name__}"] = partial(raised_in_first, partial(fail, error))
    checks["raised by pickle"] = partial(raised_in_first, lambda: lambda: None)
    checks["best of own scores"] = partial(best_of_own_scores, RUNS["ddp"])
    checks["a folder without the base"] = partial(
        refusal, RUNS["fsdp2"], callbacks=[AdapterCheckpoint(folder / "shards")], enable_checkpointing=True
    )
    checks["another base"] = partial(another_base, RUNS["fsdp2"], folder / "fsdp2, without the base")
    warnings.simplefilter("ignore")
    process = int(os.environ["RANK"])
    for way in WAYS:
        checks[f"loop, {way}"] = partial(ended, way, process, 2)
    checks["gradients, sparse"] = partial(sparse_gradients, process)
    for way in LOADED:
        checks[f"gradients, {way}"] = partial(gradients, way, process)
    keep(checks, folder / f"{process}.pt", {})
    distributed.destroy_process_group()
