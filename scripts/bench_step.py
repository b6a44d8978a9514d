"""Does a step after the drop 32 -> 16 take as long as in a model that was rank 16 from the start?

Both models live in one process; their training steps are interleaved and the ratio of each pair is taken, so that a
noisy machine disturbs both alike. Prints the median ratio with its quartiles; then the same for rank 32, and for a
second model of rank 16, which shows the noise; and for a model of rank 32 whose statistics for the metrics output and
loss are being collected, beside one that is not measured.
Run: .venv/bin/python scripts/bench_step.py [--pairs N]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import transformers

from dynrank import add_lora, lora_layers, resize
from dynrank.statistics import Grams
from dynrank.tasks.pretrained import load_classifier, model_source


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=100)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=16)
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    dropped, resize_dropped = _stepper(32, options)
    for _ in range(5):
        dropped()
    resize_dropped(16)
    fresh, _ = _stepper(16, options)
    high, _ = _stepper(32, options)
    size = f"{options.batch} x {options.length}"
    print(f"threads {torch.get_num_threads()}, batch {size} tokens, {options.pairs} pairs of steps")
    for label, step in (("32 dropped to 16", dropped), ("32", high), ("16 again (noise)", _stepper(16, options)[0])):
        ratios = _paired_ratios(step, fresh, options.pairs)
        low, median, top = statistics.quantiles(ratios, n=4)
        print(f"step time, rank {label:<17} / rank 16 from the start: {median:.3f} (quartiles {low:.3f} to {top:.3f})")
    ratios = _paired_ratios(_stepper(32, options, measured=True)[0], high, options.pairs)
    low, median, top = statistics.quantiles(ratios, n=4)
    print(f"step time, rank 32 while statistics are collected / not: {median:.3f} (quartiles {low:.3f} to {top:.3f})")


def _stepper(
    rank: int, options: argparse.Namespace, *, measured: bool = False
) -> tuple[Callable[[], None], Callable[[int], None]]:
    """A function that makes one training step of MiniLM, and one that changes its rank."""
    torch.manual_seed(0)
    model = load_classifier(model_source("minilm"), num_labels=100).train()
    add_lora(model, rank=rank, alpha=2 * rank, modules_to_save=["classifier"])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    grams = Grams(dict(lora_layers(model)), window=20) if measured else None
    ids = torch.randint(1000, 20000, (options.batch, options.length))
    labels = torch.randint(0, 100, (options.batch,))

    def step() -> None:
        optimizer.zero_grad()
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        if grams is not None:
            grams.end_step()

    def change(new_rank: int) -> None:
        resize(model, new_rank, optimizers=[optimizer])
        assert {layer.rank for _, layer in lora_layers(model)} == {new_rank}

    return step, change


def _paired_ratios(first: Callable[[], None], second: Callable[[], None], pairs: int) -> list[float]:
    ratios = []
    for index in range(pairs + 5):
        order = (first, second) if index % 2 else (second, first)
        seconds = {function: _seconds(function) for function in order}
        if index >= 5:  # the first ones warm up
            ratios.append(seconds[first] / seconds[second])
    return ratios


def _seconds(function: Callable[[], None]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
