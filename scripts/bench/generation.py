"""Seconds per generated token: plain, merged, and with an unmerged adapter by rank, of dynrank and of PEFT.

The program generates greedily, with a key-value cache, always to the full length. A round generates once with each
model in a random order. The table has medians over rounds of the ratios within a round. Adapters are on every linear
layer but the head, in float32. All models but the merged one share the weights of the plain one. SmolLM2 has its
architecture and random weights, because time does not depend on their values. The column of multiplications says what
the adapter adds to the model's own for a token, in percent.
Run: .venv/bin/python scripts/bench/generation.py [--ranks 32 16 8] [--rows N] [--prompt N] [--tokens N] [--rounds N]
"""

from __future__ import annotations

import argparse
import statistics
import warnings
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any

import torch
import transformers
from measuring import ratio, rounds
from peft import LoraConfig, get_peft_model
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from dynrank import add_lora, lora_layers, merge
from dynrank.app.models.pretrained import read_config
from dynrank.output.console import table_console


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[32, 16, 8])
    parser.add_argument("--rows", type=int, default=1, help="prompts generated from at a time")
    parser.add_argument("--prompt", type=int, default=32, help="tokens in a prompt")
    parser.add_argument("--tokens", type=int, default=32, help="tokens to generate")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.manual_seed(0)
    base = MODEL().eval()
    ids = torch.randint(1, base.get_parameter("lm_head.weight").shape[0], (options.rows, options.prompt))
    highest = max(options.ranks)
    first = options.ranks[0]
    models = {"base": base, "merged": merge(_adapted(deepcopy(base), highest))}
    models |= {f"r = {rank}": _adapted(_sharing(base), rank) for rank in options.ranks}
    models[f"PEFT, r = {first}"] = _adapted_by_peft(_sharing(base), first)
    functions = {name: partial(generate, model, ids, options.tokens) for name, model in models.items()}
    seconds = rounds(functions, options.rounds, warm_up=1)

    table = Table(
        title=f"{options.rows} x {options.tokens} tokens behind {options.prompt}, float32, "
        f"{torch.get_num_threads()} threads, {options.rounds} rounds"
    )
    for heading in ("model", "ms a token", "/ base", "quartiles", f"/ r = {first}", "quartiles", "multiplications"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for name, model in models.items():
        to_base, to_first = (ratio(seconds[name], seconds[other]) for other in ("base", f"r = {first}"))
        time = 1e3 * statistics.median(seconds[name]) / options.tokens
        table.add_row(name, f"{time:.1f}", *_text(to_base), *_text(to_first), f"+{100 * _added(model, base):.1f}%")
    table_console().print(table)


def smollm2() -> nn.Module:
    """SmolLM2-135M with random weights."""
    model: nn.Module = AutoModelForCausalLM.from_config(read_config("smollm2-135m"), dtype=torch.float32)
    return model


MODEL: Callable[[], nn.Module] = smollm2


@torch.no_grad()
def generate(model: Any, ids: Tensor, tokens: int) -> Tensor:
    """``tokens`` new ones behind each row, the most probable at a time."""
    made: Tensor = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        pad_token_id=0,
    )
    assert made.shape[1] == ids.shape[1] + tokens
    return made


def _sharing(model: nn.Module) -> nn.Module:
    """A copy with the same parameters."""
    return deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def _adapted(model: nn.Module, rank: int) -> nn.Module:
    add_lora(model, rank=rank, alpha=2 * rank)
    for _, layer in lora_layers(model):
        # B is zero at the start, and zeros may be multiplied faster.
        nn.init.normal_(layer.lora_B, std=0.01)
    return model.eval()


def _adapted_by_peft(model: nn.Module, rank: int) -> nn.Module:
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", init_lora_weights=False)
    adapted: nn.Module = get_peft_model(model, config)
    return adapted.eval()


def _added(model: nn.Module, base: nn.Module) -> float:
    """Numbers in the factors, by those in all matrices that a token is multiplied with; a merged model has none."""
    added = sum(factor.numel() for name, factor in model.named_parameters() if "lora_" in name)
    return added / sum(m.weight.numel() for m in base.modules() if isinstance(m, nn.Linear))


def _text(measured: tuple[float, str]) -> tuple[str, str]:
    median, quartiles = measured
    return f"{median:.3f}", quartiles


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    main()
