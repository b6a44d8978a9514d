"""LoRA in the experts of a Qwen3-MoE: dynrank beside PEFT, and what a budget is worth among experts.

``layers`` measures one module of 32 experts (8 of them for a token), forward and backward. PEFT adds the update to the
weights of all experts; dynrank multiplies each token by A and B of its own experts. Every round runs both once, in a
random order. ``train FOLDER`` trains the experts of a model that pretrain_small.py has made, on the C++ headers of
torch: rank 8 throughout, rank 2 throughout, and 8 cut to the parameters of 2 at a third of the run, each at every rate.
Run: .venv/bin/python scripts/bench/experts.py layers | train FOLDER [--steps N] [--seeds 0 1] [--rates R ...]
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measuring import ratio, rounds, saved_bytes
from peft import LoraConfig, get_peft_model
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3MoeConfig, Trainer, TrainingArguments
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from dynrank import add_lora, apply_lora_kernel, lora_layers
from dynrank.callbacks import RankTrainerCallback
from dynrank.layers.finding import adapter_parameters
from dynrank.output.console import table_console
from dynrank.schedules import early_budget

EXPERTS = ["gate_up_proj", "down_proj"]
ARMS: dict[str, tuple[int, Any]] = {"8": (8, []), "2": (2, []), "8, budget of 2": (8, early_budget(2))}


def main() -> None:
    """Measure, or train, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    layers = commands.add_parser("layers")
    layers.add_argument("--rounds", type=int, default=20)
    layers.add_argument("--tokens", type=int, nargs="+", default=[64, 512])
    layers.add_argument("--width", type=int, default=256)
    layers.set_defaults(run=_layers)
    train = commands.add_parser("train")
    train.add_argument("folder", type=Path)
    train.add_argument("--steps", type=int, default=150)
    train.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    train.add_argument("--rates", type=float, nargs="+", default=[2e-3, 5e-3])
    train.set_defaults(run=_train)
    options = parser.parse_args()
    options.run(options)


class Experts(nn.Module):
    """32 experts, and a choice of 8 of them for each token that stays."""

    def __init__(self, width: int) -> None:
        super().__init__()
        size = {"hidden_size": width, "moe_intermediate_size": width, "num_experts": 32}
        config = Qwen3MoeConfig(**size, experts_implementation="grouped_mm")
        self.experts = Qwen3MoeExperts(config)
        for weight in self.experts.parameters():
            nn.init.normal_(weight, std=width**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        chosen = torch.rand(len(x), 32, generator=torch.Generator().manual_seed(0)).topk(8)
        y: Tensor = self.experts(x, chosen.indices, chosen.values)
        return y


def _layers(options: argparse.Namespace) -> None:
    ours: nn.Module = add_lora(Experts(options.width), rank=8, alpha=8, target_modules=EXPERTS)
    config = LoraConfig(r=8, target_modules=[], target_parameters=[f"experts.{name}" for name in EXPERTS])
    modules = {
        "ours": ours,
        "PEFT": get_peft_model(Experts(options.width), config),
        "PEFT, op": apply_lora_kernel(get_peft_model(Experts(options.width), config)),
    }
    table = Table(title=f"32 experts, d = {options.width}, rank 8, float32, {torch.get_num_threads()} threads")
    table.add_column("tokens", justify="right")
    for heading in ("ours / PEFT", "(quartiles)", "PEFT, op / PEFT", "(quartiles)"):
        table.add_column(heading, justify="right")
    for heading in (f"{name} {what}" for what in ("ms", "MiB kept") for name in modules):
        table.add_column(heading, justify="right")
    for tokens in options.tokens:
        x = torch.randn(tokens, options.width, requires_grad=True)
        dy = torch.randn(tokens, options.width)
        steps = {name: partial(_step, module, x, dy) for name, module in modules.items()}
        seconds = rounds(steps, options.rounds)
        beside = [ratio(seconds[name], seconds["PEFT"]) for name in ("ours", "PEFT, op")]
        ratios = [text for median, quartiles in beside for text in (f"{median:.2f}", quartiles)]
        times = [f"{1e3 * statistics.median(seconds[name]):.1f}" for name in modules]
        kept = [f"{saved_bytes(module, x) / 2**20:.1f}" for module in modules.values()]
        table.add_row(str(tokens), *ratios, *times, *kept)
    table_console().print(table)


def _step(module: nn.Module, x: Tensor, dy: Tensor) -> None:
    module(x).backward(dy)


def _train(options: argparse.Namespace) -> None:
    tokenizer = AutoTokenizer.from_pretrained(options.folder)
    # The data are those of the study.
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "study"))
    from study_headers import cpp_headers

    splits = cpp_headers()
    data = {name: _rows(tokenizer, [row["text"] for row in splits[name]]) for name in ("train", "test")}
    table = Table(title=f"experts on C++ headers, {options.steps} steps, seeds {options.seeds}")
    for heading in ("rank", "rate", "loss", "kB", "ranks at the end"):
        table.add_column(heading, justify="right")
    for rate, arm in itertools.product(options.rates, ARMS):
        runs = [_run(options, data, *ARMS[arm], rate, seed) for seed in options.seeds]
        losses = ", ".join(f"{loss:.4f}" for loss, _, _ in runs)
        table.add_row(arm, f"{rate:g}", losses, f"{runs[0][1] / 1e3:.1f}", runs[0][2])
        print(rate, arm, losses, flush=True)
    table_console().print(table)


def _rows(tokenizer: Any, texts: list[str], length: int = 128) -> list[dict[str, list[int]]]:
    ids = [token for row in tokenizer(texts)["input_ids"] for token in row]
    rows = [ids[start : start + length] for start in range(0, len(ids) - length, length)]
    return [{"input_ids": row, "labels": row} for row in rows]


def _run(
    options: argparse.Namespace, data: Any, rank: int, schedule: Any, rate: float, seed: int
) -> tuple[float, int, str]:
    """(loss on the test rows, bytes of the factors, lowest and highest rank) of a run."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(options.folder)
    model.config.output_router_logits = False
    add_lora(model, rank=rank, alpha=rank, target_modules=EXPERTS)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=options.steps,
            per_device_train_batch_size=8,
            learning_rate=rate,
            weight_decay=0.0,
            warmup_steps=10,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            seed=seed,
        )
        callback = RankTrainerCallback(list(schedule))
        trainer = Trainer(
            model, arguments, train_dataset=data["train"], eval_dataset=data["test"][:200], callbacks=[callback]
        )
        trainer.train()
        loss = trainer.evaluate()["eval_loss"]
    ranks = [layer.rank for _, layer in lora_layers(model)]
    held = sum(factor.numel() * factor.element_size() for factor in adapter_parameters(model))
    return loss, held, f"{min(ranks)} to {max(ranks)}"


if __name__ == "__main__":
    main()
