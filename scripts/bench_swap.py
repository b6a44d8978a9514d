"""How long does swap_adapter take in a live model, from memory and from disk, and does it keep anything?

Two adapters of unlike ranks and layers (rank 32 on all linear layers; rank 16 on attention, 4 in half of its layers) go
in and out of one model in turn: with nobody else there, and while another thread calls the model without a pause, when
a swap waits for the forward under way. Prints medians with their quartiles and the bytes of factors that come in;
what the bytes of a 7B's adapter would take at the same rate (arithmetic, not measured); and memory and handles over a
hundred swaps and more. Exits with 1 if these grow.
Run: .venv/bin/python scripts/bench_swap.py [--swaps N] [--model NAME]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
import transformers
from soak import MIB, open_handles, resident, slope
from torch import nn

from dynrank import add_lora, lora_layers, read_adapter, save_adapter, swap_adapter
from dynrank.tasks.pretrained import head_names, load_classifier, model_source

BYTES_7B = 32 * 2 * 16 * (4096 + 4096) * 4  # Llama 7B: q and v of 32 layers, rank 16, float32


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
    return load_classifier(model_source(model_name, "--model"), num_labels=100).eval()


def factor_bytes(adapter: Path) -> int:
    """Bytes of the tensors that come in with the adapter."""
    return sum(tensor.nbytes for pair in read_adapter(adapter).factors.values() for tensor in pair.values())


@contextmanager
def calls(model: nn.Module, seconds: list[float]) -> Iterator[None]:
    """Another thread calls the model, one forward after the other, and notes how long each takes."""
    ids, stop = torch.randint(1000, 20000, (8, 16)), threading.Event()

    def work() -> None:
        with torch.no_grad():
            while not stop.is_set():
                start = time.perf_counter()
                model(input_ids=ids)
                seconds.append(time.perf_counter() - start)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def times(model: nn.Module, adapters: Sequence[object], swaps: int) -> list[float]:
    """Milliseconds of each swap, after four that warm up."""
    measured = []
    for index in range(swaps + 4):
        start = time.perf_counter()
        swap_adapter(model, adapters[index % 2])  # type: ignore[arg-type]
        measured.append(1e3 * (time.perf_counter() - start))
    return measured[4:]


def leak(model: nn.Module, adapters: Sequence[object], swaps: int) -> tuple[str, bool]:
    """What the process holds over so many swaps, read at every tenth, and whether that is level."""
    times(model, adapters, 10)
    handles, marks, memory = open_handles(), list[float](), list[float]()
    for mark in range(10, max(swaps, 60) + 1, 10):
        times(model, adapters, 6)  # and four that warm up
        marks.append(mark)
        memory.append(resident() / MIB)
    rate, error = slope(marks, memory)
    level = bool(rate <= max(2 * error, 0.01)) and open_handles() <= handles  # MiB a swap; an adapter has more than 1
    text = f"{marks[-1]:.0f} swaps: {rate:+.4f} MiB a swap, standard error {error:.4f}; "
    text += f"file handles {handles} -> {open_handles()}; {'level' if level else 'NOT LEVEL'}"
    return text, level


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--swaps", type=int, default=100)
    parser.add_argument("--model", default="minilm", help="short name, folder or hub name")
    options = parser.parse_args(arguments)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        disk = write_adapters(options.model, Path(folder))
        memory, model, sizes = [read_adapter(path) for path in disk], load(options.model), [*map(factor_bytes, disk)]
        mean = sum(sizes) / 2
        layers = " and ".join(str(len(adapter.factors)) for adapter in memory)
        print(f"{options.model}: adapters of {layers} layers, {' and '.join(f'{size / 1e6:.2f}' for size in sizes)} MB")
        print("adapter from  model is     ms a swap (quartiles)     a 7B's 33.6 MB at this rate (arithmetic)")
        for source, adapters in (("memory", memory), ("disk", disk)):
            for state in ("quiet", "in use"):
                forwards = list[float]()
                with calls(model, forwards) if state == "in use" else nullcontext():
                    low, median, high = statistics.quantiles(times(model, adapters, options.swaps), n=4)
                at_7b = f"{median * BYTES_7B / mean:8.0f} ms" if state == "quiet" else ""
                note = f"a forward takes {1e3 * statistics.median(forwards):.1f} ms" if forwards else ""
                print(f"{source:<12}  {state:<8}  {median:8.2f} ({low:.2f} to {high:.2f})  {at_7b}{note}")
        text, level = leak(model, [memory[0], disk[1]], options.swaps)
    print(text)
    return 0 if level else 1


if __name__ == "__main__":
    sys.exit(main())
