"""How long does swap_adapter take in a live model, from memory and from disk, and does the model keep any memory?

Two random adapters with different ranks and layers (rank 32 on all linear layers; rank 16 on attention, 4 in half of
its layers) go in and out of one classifier in turn. The program prints medians with quartiles, the bytes of the new
factors, the time that a 7B model's adapter would take at the same speed (arithmetic, not measured), and memory and
file handles over a hundred swaps and more. It exits with 1 if these grow.
Run: .venv/bin/python scripts/bench/swap.py [--swaps N] [--model NAME]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from soak import MIB, open_handles, resident, slope
from torch import nn

from dynrank import add_lora, lora_layers, read_adapter, save_adapter, swap_adapter
from dynrank.app.models.pretrained import head_names, load_classifier

# Bytes of an adapter of Llama 7B: q and v of 32 layers, rank 16, float32.
BYTES_7B = 32 * 2 * 16 * (4096 + 4096) * 4


def write_adapters(model_name: str, folder: Path) -> list[Path]:
    """Two adapters of random factors for the model."""
    first = add_lora(load(model_name), rank=32, alpha=64)
    names = [name for name, _ in lora_layers(add_lora(load(model_name), rank=16, target_modules="attention"))]
    rules = {name: {"rank": 4, "alpha": 8} for name in names[::2]}
    second = add_lora(load(model_name), rank=16, alpha=16, target_modules="attention", rank_map=rules)
    for name, model in (("first", first), ("second", second)):
        for head in head_names(model):
            model.get_submodule(head).requires_grad_(True)
        for _, layer in lora_layers(model):
            nn.init.normal_(layer.lora_B, std=0.01)
        save_adapter(model, folder / name)
    return [folder / "first", folder / "second"]


def load(model_name: str) -> nn.Module:
    """The model with a head for 100 classes, the same each time."""
    torch.manual_seed(0)
    return load_classifier(model_name, 100, "--model").eval()


def factor_bytes(adapter: Path) -> int:
    """Bytes of the tensors that come in with the adapter."""
    stored = read_adapter(adapter)
    return sum(stored.tensor(key).nbytes for layer in stored.layers.values() for key in layer.keys)


def times(model: nn.Module, adapters: Sequence[object], swaps: int, warm_up: int = 4) -> list[float]:
    """Milliseconds of each swap, after those that warm up."""
    measured = []
    for index in range(swaps + warm_up):
        start = time.perf_counter()
        swap_adapter(model, adapters[index % 2])  # type: ignore[arg-type]
        measured.append(1e3 * (time.perf_counter() - start))
    return measured[warm_up:]


def leak(model: nn.Module, adapters: Sequence[object], swaps: int) -> tuple[str, bool]:
    """What the process holds over so many swaps, read at every tenth, and whether that is level."""
    times(model, adapters, 10)
    handles = open_handles()
    marks = list[float]()
    memory = list[float]()
    for mark in range(10, max(swaps, 60) + 1, 10):
        # Four more swaps warm up.
        times(model, adapters, 6)
        marks.append(mark)
        memory.append(resident() / MIB)
    rate, error = slope(marks, memory)
    # In MiB a swap. An adapter has more than 1 MiB.
    level = bool(rate <= max(2 * error, 0.01)) and open_handles() <= handles
    text = f"{marks[-1]:.0f} swaps: {rate:+.4f} MiB a swap, standard error {error:.4f}; "
    text += f"file handles {handles} -> {open_handles()}; {'level' if level else 'NOT LEVEL'}"
    return text, level


def row(model: nn.Module, source: str, adapters: Sequence[object], swaps: int, size: float) -> None:
    """Measure and print swaps; ``size``: bytes of an adapter."""
    low, median, high = statistics.quantiles(times(model, adapters, swaps), n=4)
    print(f"{source:<12}  {median:8.2f} ({low:.2f} to {high:.2f})  {median * BYTES_7B / size:8.0f} ms")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--swaps", type=int, default=100, help="from memory, and as many from disk")
    parser.add_argument("--model", default="minilm", help="short name, folder or hub name")
    options = parser.parse_args(arguments)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        disk = write_adapters(options.model, Path(folder))
        model = load(options.model)
        memory = [read_adapter(path) for path in disk]
        sizes = [*map(factor_bytes, disk)]
        layers = " and ".join(str(len(adapter.layers)) for adapter in memory)
        print(f"{options.model}: adapters of {layers} layers, {' and '.join(f'{size / 1e6:.2f}' for size in sizes)} MB")
        print("adapter from  ms a swap (quartiles)     a 7B's 33.6 MB at this rate (arithmetic)")
        for source, adapters in (("memory", memory), ("disk", disk)):
            row(model, source, adapters, options.swaps, sum(sizes) / 2)
        text, level = leak(model, [memory[0], disk[1]], options.swaps)
    print(text)
    return 0 if level else 1


if __name__ == "__main__":
    sys.exit(main())
