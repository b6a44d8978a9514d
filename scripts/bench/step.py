"""Whole training steps: of three models under PEFT and dynrank; of a small model with a waiting callback.

The models are MiniLM, SmolLM2-135M, and a Llama of four blocks of width 64. All models of a comparison live in one
process. A round makes one step of each in a random order, and the table has medians over rounds of the ratios within a
round. Adapters are on every linear layer but the head, in float32. Peak memory is what a step allocates at one time
beyond weights, adapters and optimizer state. "State" is adapters, their gradients and their moments, in MB; beside it
its mean over a run that is cut after a third of its steps. SmolLM2 has its architecture and random weights, because the
time of a step does not depend on their values. The frozen model is in --dtype.

The last table has the host time of a step, in CPU seconds of the process, with a callback whose stage is not due yet,
divided by the time without it. The model has --blocks blocks of width 64, PEFT's adapters on all linear layers and two
batches in a step; --blocks 0 leaves it out.
Run: .venv/bin/python scripts/bench/step.py [--models minilm smollm2 small] [--dtype bfloat16] [--ranks 32 16]
     [--dropouts 0 0.1] [--blocks 24] [--rounds N] [--device cuda]
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers
from measuring import peak_bytes, ratio, rounds
from peft import LoraConfig, get_peft_model
from rich.table import Table
from stepping import by_lightning, by_transformers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from dynrank import add_lora, apply_lora_kernel, lora_layers, resize
from dynrank.app.models.pretrained import load_classifier
from dynrank.callbacks import RankMonitor, RankScheduler, RankTrainerCallback
from dynrank.output.console import table_console
from dynrank.schedules import Stage, early_budget
from dynrank.targets import Budget
from dynrank.triggers import At

SMOLLM2 = {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
SMOLLM2 |= {"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True, "use_cache": False}
# Rows, and tokens in a row.
BATCHES = {"minilm": (32, 16), "smollm2": (4, 128), "small": (2, 16)}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", choices=BATCHES, default=list(BATCHES))
    parser.add_argument("--ranks", nargs=2, type=int, default=[32, 16], metavar=("HIGH", "LOW"))
    parser.add_argument("--dropouts", nargs="+", type=float, default=[0.0, 0.1])
    parser.add_argument("--blocks", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    options = parser.parse_args()
    for name in options.models:
        rows, length = BATCHES[name]
        tokens = rows * length
        where = torch.cuda.get_device_name() if options.device == "cuda" else f"{torch.get_num_threads()} threads"
        table = Table(title=f"{name}: steps of {rows} x {length} tokens, {options.dtype}, {where}")
        for heading in ("dropout", "step", "time", "quartiles", "tokens/s", "peak of a step / PEFT's", "state", "mean"):
            table.add_column(heading, justify="left" if heading == "step" else "right")
        for dropout in options.dropouts:
            for row in _compare(name, dropout, tokens, options):
                table.add_row(str(dropout), *row)
        table_console().print(table)
    if options.blocks:
        table = Table(title=f"a callback that waits: CPU time of a step of {options.blocks} blocks / without it")
        for heading in ("trainer", "callback", "time", "quartiles", "ms"):
            table.add_column(heading, justify="left" if heading in ("trainer", "callback") else "right")
        for row in _wait(options.blocks, options.rounds):
            table.add_row(*row)
        table_console().print(table)


def _compare(name: str, dropout: float, tokens: int, options: argparse.Namespace) -> Iterator[tuple[str, ...]]:
    high, low = options.ranks
    peft = _Training(name, dropout, -high, options)
    uncut = _Training(name, dropout, high, options)
    cut = _Training(name, dropout, high, options)
    with_op = _Training(name, dropout, -high, options)
    apply_lora_kernel(with_op.model)
    from_the_start = _Training(name, dropout, low, options)
    cut.step()
    before = cut.state_bytes()
    cut.drop(low)
    trainings = {"PEFT": peft, "PEFT, op": with_op, "high": uncut, "cut": cut, "low": from_the_start}
    steps = {key: training.step for key, training in trainings.items()}
    seconds = rounds(steps, options.rounds)
    peak = {key: peak_bytes(step) for key, step in steps.items()}
    state = {key: f"{training.state_bytes() / 1e6:.2f}" for key, training in trainings.items()}
    mean = state | {"cut": f"{(before / 3 + 2 / 3 * cut.state_bytes()) / 1e6:.2f}"}
    rate = tokens / statistics.median(seconds["PEFT"])
    yield f"PEFT, r = {high}", "1", "", f"{rate:.0f}", "1", state["PEFT"], mean["PEFT"]
    for label, above, below in (
        (f"PEFT with the op / PEFT, r = {high}", "PEFT, op", "PEFT"),
        (f"dynrank, r = {high} / PEFT, r = {high}", "high", "PEFT"),
        (f"dynrank, {high} cut to {low} / r = {low} from the start", "cut", "low"),
        (f"dynrank, {high} cut to {low} / r = {high}", "cut", "high"),
    ):
        median, quartiles = ratio(seconds[above], seconds[below])
        rate = tokens / statistics.median(seconds[above])
        beside_peft = f"{peak[above] / peak['PEFT']:.2f}"
        yield label, f"{median:.3f}", quartiles, f"{rate:.0f}", beside_peft, state[above], mean[above]


def _wait(blocks: int, count: int) -> Iterator[tuple[str, ...]]:
    # At the end of a run that nobody runs to its end; the singular values need no record of the steps before.
    by_weight = Stage(At(fraction=0.99), Budget(share=0.5, by="weight"))
    default = early_budget(4)
    for trainer, run, kind in (
        ("Lightning", by_lightning, RankScheduler),
        ("transformers", by_transformers, RankTrainerCallback),
    ):
        kinds = {"none": [], "by weight": [kind(by_weight)], "default schedule": [kind(default)]}
        if kind is RankScheduler:
            kinds["by weight, and RankMonitor"] = [kind(by_weight), RankMonitor()]
        runs = {name: run(_small(blocks), *callbacks) for name, callbacks in kinds.items()}
        seconds = rounds({name: each.step for name, each in runs.items()}, count, clock=time.process_time)
        for each in runs.values():
            each.end()
        for name, taken in seconds.items():
            median, quartiles = ratio(taken, seconds["none"])
            yield trainer, name, f"{median:.3f}", quartiles, f"{1e3 * statistics.median(taken):.1f}"


def _small(blocks: int) -> nn.Module:
    torch.manual_seed(0)
    size = {"vocab_size": 100, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**size, num_hidden_layers=blocks, use_cache=False))
    return get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"))


class _Training:
    """A model with its optimizer and one batch; a negative rank is PEFT's."""

    def __init__(self, name: str, dropout: float, rank: int, options: argparse.Namespace) -> None:
        torch.manual_seed(0)
        model, labels = MODELS[name]()
        device = options.device
        model = model.to(device, getattr(torch, options.dtype))
        rows, length = BATCHES[name]
        ids = torch.randint(model.config.vocab_size, (rows, length), device=device)
        classes = None if labels is None else torch.randint(0, labels, (rows,), device=device)
        self.batch = {"input_ids": ids, "labels": ids if classes is None else classes}
        heads = [] if labels is None else ["classifier"]
        size = {"target_modules": "all-linear", "modules_to_save": heads}
        if rank < 0:
            config = LoraConfig(r=-rank, lora_alpha=64, lora_dropout=dropout, **size)
            self.model: nn.Module = get_peft_model(model, config)
        else:
            self.model = add_lora(model, rank=rank, alpha=2 * rank, dropout=dropout, **size)
        for parameter_name, parameter in self.model.named_parameters():
            # B is zero at the start, and zeros may be multiplied faster.
            if "lora_B" in parameter_name:
                nn.init.normal_(parameter, std=0.01)
        self.model.train()
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-4)

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.model(**self.batch).loss.backward()
        self.optimizer.step()

    def state_bytes(self) -> int:
        """Bytes of the adapters' factors, their gradients and what the optimizer holds of them."""
        factors = [parameter for name, parameter in self.model.named_parameters() if "lora_" in name]
        held = [value for factor in factors for value in self.optimizer.state[factor].values()]
        return sum(tensor.nbytes for tensor in held) + 2 * sum(factor.nbytes for factor in factors)

    def drop(self, rank: int) -> None:
        resize(self.model, rank, optimizers=[self.optimizer])
        assert {layer.rank for _, layer in lora_layers(self.model)} == {rank}


def _minilm() -> tuple[nn.Module, int | None]:
    return load_classifier("minilm", 100), 100


def _smollm2() -> tuple[nn.Module, int | None]:
    return LlamaForCausalLM(LlamaConfig(**SMOLLM2)), None


def _tiny() -> tuple[nn.Module, int | None]:
    size = {"vocab_size": 100, "hidden_size": 64, "intermediate_size": 192, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**size, num_hidden_layers=4, use_cache=False)), None


MODELS: dict[str, Callable[[], tuple[Any, int | None]]] = {"minilm": _minilm, "smollm2": _smollm2, "small": _tiny}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    main()
