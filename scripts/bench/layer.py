"""One LoRA layer, forward and backward: PEFT's without and with the op, dynrank's and the frozen linear.

Every round runs the four once in a new order. The table has the median over rounds of the ratios within a round, so
a noisy machine disturbs all alike. Saved bytes are what autograd keeps between forward and backward besides the
parameters (saved_tensors_hooks). Floor: the frozen linear's time x (1 + 3 r / d), the share of floating-point
operations that the update adds.
Run: .venv/bin/python scripts/bench/layer.py [--rounds N] [--tokens M] [--widths 576 1024 2048] [--ranks 8 16 64]
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import warnings

import torch
from measuring import ratio, rounds, saved_bytes
from peft import LoraConfig, get_peft_model
from rich.table import Table
from torch import nn

from dynrank import add_lora, apply_lora_kernel
from dynrank.output.console import table_console

# The dtype of the base. The adapters are float32, the default of both libraries.
KINDS = ("fp32", "bf16")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--widths", type=int, nargs="+", default=[576, 1024, 2048])
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 16, 64])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    options = parser.parse_args()
    table = Table(title=f"forward + backward, {options.tokens} tokens, {torch.get_num_threads()} threads")
    for heading in ("base", "d", "r", "p", "ours / PEFT", "(quartiles)", "PEFT, op / PEFT", "(quartiles)"):
        table.add_column(heading, justify="right")
    for heading in ("ours / frozen", "PEFT / frozen", "floor", "frozen ms", "saved bytes / PEFT: ours", "PEFT, op"):
        table.add_column(heading, justify="right")
    for kind, width, rank, p in itertools.product(options.kinds, options.widths, options.ranks, (0.0, 0.1)):
        table.add_row(kind, str(width), str(rank), str(p), *_measure(kind, width, rank, p, options))
    table_console().print(table)


def _measure(kind: str, width: int, rank: int, p: float, options: argparse.Namespace) -> list[str]:
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[kind]
    layers = {
        "frozen": frozen(width, dtype),
        "PEFT": peft(width, rank, p, dtype),
        "PEFT, op": apply_lora_kernel(peft(width, rank, p, dtype)),
        "ours": ours(width, rank, p, dtype),
    }
    x = torch.randn(options.tokens, width).to(dtype).requires_grad_()
    dy = torch.randn(options.tokens, width).to(dtype)
    seconds = rounds(
        {name: lambda layer=layer: layer(x).backward(dy) for name, layer in layers.items()}, options.rounds
    )
    saved = {name: saved_bytes(layer, x) for name, layer in layers.items()}
    beside = (ratio(seconds[name], seconds["PEFT"]) for name in ("ours", "PEFT, op"))
    return [
        *(text for median, quartiles in beside for text in (f"{median:.2f}", quartiles)),
        f"{ratio(seconds['ours'], seconds['frozen'])[0]:.2f}",
        f"{ratio(seconds['PEFT'], seconds['frozen'])[0]:.2f}",
        f"{1 + 3 * rank / width:.2f}",
        f"{1e3 * statistics.median(seconds['frozen']):.2f}",
        *(f"{saved[name] / saved['PEFT']:.2f}" for name in ("ours", "PEFT, op")),
    ]


def frozen(width: int, dtype: torch.dtype) -> nn.Module:
    return nn.Sequential(nn.Linear(width, width)).to(dtype).requires_grad_(False)


def ours(
    width: int,
    rank: int,
    p: float,
    dtype: torch.dtype,
    backend: str = "auto",
    adapter_dtype: torch.dtype = torch.float32,
) -> nn.Module:
    model = frozen(width, dtype)
    add_lora(model, rank=rank, alpha=2 * rank, target_modules=["0"], dropout=p, backend=backend, dtype=adapter_dtype)
    return _trained(model)


def peft(width: int, rank: int, p: float, dtype: torch.dtype) -> nn.Module:
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["0"], lora_dropout=p)
    return _trained(get_peft_model(frozen(width, dtype), config))


def _trained(model: nn.Module) -> nn.Module:
    """B is zero in a new adapter, and a layer that multiplies zeros may be faster than one that does not."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.01)
    return model.train()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
