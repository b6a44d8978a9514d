"""Layers that read one x, forward and backward: in a group that shares one pass over x (lora.group), and one by one.

The first table has the layers alone. The second has whole training steps (AdamW, adapters of rank 32 on every linear
layer but the head) of models with the widths of MiniLM and SmolLM2-135M, six blocks each, random weights. The figures
are medians over rounds of the ratios within a round. Bases are in float32 or bfloat16, adapters in float32.
Run: .venv/bin/python scripts/bench_group.py [--rounds N] [--tokens M] [--ranks 16 32] [--dropouts 0 0.1]
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import warnings
from collections.abc import Callable, Mapping

import torch
from measuring import ratio, rounds
from rich.table import Table
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from dynrank import add_lora, lora_layers
from dynrank.output.console import table_console

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# {title: (d_in, d_out of each layer)}.
READERS = {
    "q, k, v of MiniLM": (384, {"query": 384, "key": 384, "value": 384}),
    "q, k, v of SmolLM2": (576, {"q_proj": 576, "k_proj": 192, "v_proj": 192}),
    "gate, up of SmolLM2": (576, {"gate_proj": 1536, "up_proj": 1536}),
    "q, k, v of d = 1024": (1024, {"q_proj": 1024, "k_proj": 1024, "v_proj": 1024}),
}
# Tokens.
VOCABULARY, ROW = 3000, 64


def minilm() -> nn.Module:
    sizes = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 12}
    return BertForSequenceClassification(BertConfig(vocab_size=VOCABULARY, **sizes))


def smollm2() -> nn.Module:
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 9}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=3, use_cache=False, **sizes))


MODELS: dict[str, Callable[[], nn.Module]] = {"MiniLM": minilm, "SmolLM2": smollm2}


class Readers(nn.Module):
    """Linear layers that read one x."""

    def __init__(self, d_in: int, d_outs: Mapping[str, int]) -> None:
        super().__init__()
        for name, d_out in d_outs.items():
            self.add_module(name, nn.Linear(d_in, d_out, bias=False))

    def forward(self, x: Tensor) -> list[Tensor]:
        return [layer(x) for layer in self.children()]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 32])
    parser.add_argument("--dropouts", type=float, nargs="+", default=[0.0, 0.1])
    options = parser.parse_args()
    heading = f"{options.tokens} tokens, {torch.get_num_threads()} threads"
    table = _table(f"layers, forward + backward, {heading}")
    for name, kind, rank, p in itertools.product(READERS, DTYPES, options.ranks, options.dropouts):
        pair = {group: _layers(*READERS[name], DTYPES[kind], rank, p, group, options.tokens) for group in (True, False)}
        table.add_row(name, kind, str(rank), str(p), *_compared(pair, options.rounds))
    table_console().print(table)
    table = _table(f"whole steps, {heading}")
    for name, kind, p in itertools.product(MODELS, DTYPES, options.dropouts):
        pair = {group: _step(MODELS[name], DTYPES[kind], p, group, options.tokens) for group in (True, False)}
        table.add_row(name, kind, "32", str(p), *_compared(pair, options.rounds))
    table_console().print(table)


def _table(title: str) -> Table:
    table = Table(title=title)
    for heading in ("what", "base", "r", "p", "grouped / one by one", "(quartiles)", "one by one, ms"):
        table.add_column(heading, justify="left" if heading == "what" else "right")
    return table


def _compared(pair: Mapping[bool, Callable[[], object]], count: int) -> list[str]:
    seconds = rounds({"grouped": pair[True], "alone": pair[False]}, count)
    median, quartiles = ratio(seconds["grouped"], seconds["alone"])
    return [f"{median:.3f}", quartiles, f"{1e3 * statistics.median(seconds['alone']):.1f}"]


def _layers(
    d_in: int, d_outs: Mapping[str, int], dtype: torch.dtype, rank: int, p: float, group: bool, tokens: int
) -> Callable[[], object]:
    model = Readers(d_in, d_outs).to(dtype)
    _adapted(model, rank, p, group, list(d_outs))
    x = torch.randn(tokens, d_in).to(dtype).requires_grad_()
    dys = [torch.randn(tokens, d_out).to(dtype) for d_out in d_outs.values()]
    return lambda: torch.autograd.backward(model(x), dys)


def _step(build: Callable[[], nn.Module], dtype: torch.dtype, p: float, group: bool, tokens: int) -> Callable[[], None]:
    model = _adapted(build().to(dtype), 32, p, group, "all-linear")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    ids = torch.randint(0, VOCABULARY, (max(1, tokens // ROW), ROW))
    labels = ids if isinstance(model, LlamaForCausalLM) else torch.zeros(len(ids), dtype=torch.long)

    def step() -> None:
        optimizer.zero_grad()
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()

    return step


def _adapted(model: nn.Module, rank: int, p: float, group: bool, targets: str | list[str]) -> nn.Module:
    add_lora(model, rank=rank, dropout=p, target_modules=targets, group=group)
    # B is zero at the start, and zeros may be multiplied faster.
    for _, layer in lora_layers(model):
        nn.init.normal_(layer.lora_B, std=0.01)
    return model.train()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
