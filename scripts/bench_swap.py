"""How long does swap_adapter take in a live model, from memory and from disk, and does the model keep any memory?

Two adapters with different ranks and layers go in and out of one model in turn: first with no other user, then while
another thread uses the model without a pause. There a swap waits for the call under way.

For a classifier the adapters are random (rank 32 on all linear layers; rank 16 on attention, 4 in half of its layers),
and the thread calls the model. For a causal language model they are a medical and a code adapter (two_writers.py),
trained for --steps and kept in --adapters. Then the thread generates texts, and each text is compared, token by token,
with what a freshly loaded model writes with either adapter.

The program prints medians with quartiles, the bytes of the new factors, the time that a 7B model's adapter would take
at the same speed (arithmetic, not measured), and memory and file handles over a hundred swaps and more. It exits with 1
if these grow, if a text is neither adapter's, or if one adapter wrote no text.
Run: .venv/bin/python scripts/bench_swap.py [--swaps N] [--model NAME] [--steps N] [--tokens N] [--adapters DIR]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from soak import MIB, open_handles, resident, slope
from torch import nn
from two_writers import data_of, is_causal, load_writer, prompts_of
from two_writers import write_adapters as train_adapters

from dynrank import add_lora, load_adapter, lora_layers, read_adapter, save_adapter, swap_adapter
from dynrank.models.pretrained import head_names, load_classifier

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


@dataclass
class Forwards:
    """One forward after the other."""

    model: nn.Module
    noun: str = "a forward"

    def use(self, index: int) -> None:
        """Use the model for the ``index``-th time."""
        with torch.no_grad():
            self.model(input_ids=torch.arange(1000, 1128).reshape(8, 16))

    def verdict(self) -> tuple[str, bool]:
        """What came of it since the last call, and whether that is right."""
        return "", True


@dataclass
class Texts:
    """One greedy text after the other, all of one length, counted by which adapter writes the same by itself.

    Args:
        model: a causal language model.
        prompts: token ids, taken in turn.
        expected: by adapter, what it writes behind each prompt.
        tokens: of a text.
    """

    model: Any
    prompts: Sequence[Sequence[int]]
    expected: Sequence[Sequence[Sequence[int]]]
    tokens: int
    noun: str = "a text"
    written: Counter[str] = field(default_factory=Counter)

    def use(self, index: int) -> None:
        """Write the ``index``-th text."""
        at = index % len(self.prompts)
        text = write(self.model, self.prompts[at], self.tokens)
        by = [name for name, texts in zip(("first", "second"), self.expected, strict=True) if texts[at] == text]
        self.written[" or ".join(by) or "neither"] += 1

    def verdict(self) -> tuple[str, bool]:
        """How many are whose, since the last call, and whether all are one's and both have written."""
        count, self.written = self.written, Counter()
        right = not count["neither"] and bool(count["first"] and count["second"])
        return f"; texts of the {', '.join(f'{name}: {n}' for name, n in sorted(count.items()))}", right


def write(model: Any, prompt: Sequence[int], tokens: int) -> list[int]:
    """``tokens`` tokens behind the prompt, greedily, past the end of the text if need be."""
    ids = torch.tensor([list(prompt)])
    made = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        pad_token_id=0,
    )
    text: list[int] = made[0, len(prompt) :].tolist()
    return text


def texts_of(model_name: str, model: nn.Module, adapters: Sequence[Path], prompts: Any, tokens: int) -> Texts:
    """What will be written, with what each adapter writes in a freshly loaded model; prompts where it differs."""
    expected = []
    for adapter in adapters:
        fresh = load_adapter(load_writer(model_name), adapter).eval()
        expected.append([write(fresh, prompt, tokens) for prompt in prompts])
    unlike = [i for i in range(len(prompts)) if expected[0][i] != expected[1][i]]
    print(f"the two write otherwise behind {len(unlike)} of {len(prompts)} prompts, which are taken")
    if not unlike:
        raise SystemExit("the two adapters cannot be told apart by what they write; set --steps higher")
    return Texts(model, [prompts[i] for i in unlike], [[texts[i] for i in unlike] for texts in expected], tokens)


@contextmanager
def in_use(use: Callable[[int], None], seconds: list[float]) -> Iterator[Callable[[], None]]:
    """Another thread uses the model, once after the other, and notes how long each takes.

    Gives a function that waits for the middle of a use, with one use at least from beginning to end before it.
    """
    stop, started, failures = threading.Event(), threading.Event(), list[Exception]()

    def work() -> None:
        index = 0
        try:
            while not stop.is_set():
                start = time.perf_counter()
                started.set()
                use(index)
                seconds.append(time.perf_counter() - start)
                index += 1
        except Exception as error:
            failures.append(error)

    def reach_the_middle() -> None:
        ended = len(seconds)
        while len(seconds) < ended + 2 and not failures:
            time.sleep(1e-4)
        time.sleep(seconds[-1] / 2 if seconds else 0)

    thread = threading.Thread(target=work)
    thread.start()
    started.wait()
    try:
        yield reach_the_middle
    finally:
        stop.set()
        thread.join()
    if failures:
        raise failures[0]


def times(
    model: nn.Module,
    adapters: Sequence[object],
    swaps: int,
    warm_up: int = 4,
    before: Callable[[], None] = lambda: None,
) -> list[float]:
    """Milliseconds of each swap, after those that warm up; ``before`` is called before each and not timed."""
    measured = []
    for index in range(swaps + warm_up):
        before()
        start = time.perf_counter()
        swap_adapter(model, adapters[index % 2])  # type: ignore[arg-type]
        measured.append(1e3 * (time.perf_counter() - start))
    return measured[warm_up:]


def leak(model: nn.Module, adapters: Sequence[object], swaps: int) -> tuple[str, bool]:
    """What the process holds over so many swaps, read at every tenth, and whether that is level."""
    times(model, adapters, 10)
    handles, marks, memory = open_handles(), list[float](), list[float]()
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
    """Measure and print swaps of a model that nobody uses; ``size``: bytes of an adapter."""
    low, median, high = statistics.quantiles(times(model, adapters, swaps), n=4)
    print(f"{source:<12}  quiet     {median:8.2f} ({low:.2f} to {high:.2f})  {median * BYTES_7B / size:8.0f} ms")


def row_in_use(model: nn.Module, source: str, adapters: Sequence[object], swaps: int, user: Forwards | Texts) -> bool:
    """Measure and print swaps of a model in use; returns whether what came of the use is right."""
    seconds = list[float]()
    with in_use(user.use, seconds) as reach_the_middle:
        measured = times(model, adapters, swaps, warm_up=2, before=reach_the_middle)
    low, median, high = statistics.quantiles(measured, n=4)
    text, right = user.verdict()
    whole = 1e3 * statistics.median(seconds)
    print(f"{source:<12}  in use    {median:8.2f} ({low:.2f} to {high:.2f})  {user.noun} takes {whole:.1f} ms{text}")
    return right


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--swaps", type=int, default=100, help="of each kind; a fifth of them while texts are written")
    parser.add_argument("--model", default="minilm", help="short name, folder or hub name")
    parser.add_argument("--steps", type=int, default=30, help="of training for each of the two tasks")
    parser.add_argument("--tokens", type=int, default=32, help="of a text")
    parser.add_argument("--adapters", type=Path, help="folder of trained adapters; default outputs/bench_swap/MODEL")
    options = parser.parse_args(arguments)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    user: Forwards | Texts
    with tempfile.TemporaryDirectory() as folder:
        if is_causal(options.model):
            kept, data = (
                options.adapters or Path("outputs/bench_swap", Path(options.model).name),
                data_of(options.model),
            )
            disk, model = train_adapters(options.model, data, options.steps, kept), load_writer(options.model)
            user = texts_of(options.model, model, disk, prompts_of(data, 4), options.tokens)
            used = max(10, options.swaps // 5)
        else:
            disk, model, used = write_adapters(options.model, Path(folder)), load(options.model), options.swaps
            user = Forwards(model)
        memory, sizes, right = [read_adapter(path) for path in disk], [*map(factor_bytes, disk)], True
        layers = " and ".join(str(len(adapter.layers)) for adapter in memory)
        print(f"{options.model}: adapters of {layers} layers, {' and '.join(f'{size / 1e6:.2f}' for size in sizes)} MB")
        print("adapter from  model is     ms a swap (quartiles)     a 7B's 33.6 MB at this rate (arithmetic)")
        for source, adapters in (("memory", memory), ("disk", disk)):
            row(model, source, adapters, options.swaps, sum(sizes) / 2)
            right &= row_in_use(model, source, adapters, used, user)
        text, level = leak(model, [memory[0], disk[1]], options.swaps)
    print(text)
    if not right:
        print("WRONG: a text was neither adapter's, or one of them wrote none")
    return 0 if level and right else 1


if __name__ == "__main__":
    sys.exit(main())
