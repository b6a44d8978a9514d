"""``dynrank squeeze`` of image models' LoRA files beside the method of kohya's resize_lora, by its description.

That method forms the product of each layer's factors and takes its SVD: the whole one, or ``torch.svd_lowrank`` of
twice the rank that is kept (pull request 2240 of sd-scripts, with its 2 iterations). Two functions here do the same.
Layers are timed in one process, in interleaved rounds. Whole files have the shapes of SDXL and Flux, and random factors
whose singular values fall as 1 / i. Each method takes them from disk to disk in a process of its own, in turns. Methods
of ``--sampled`` take one layer of each shape, and their time is multiplied by the number of such layers.
Run: .venv/bin/python scripts/bench/single_file.py [--rounds N] [--full-below N] [--layers NAME ...] [--files sdxl flux]
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from measuring import ratio, rounds
from safetensors.torch import load_file, save_file
from torch import Tensor

from dynrank.adapters.squeeze import squeeze
from dynrank.linalg import singular_values, truncate_product

# {name of a layer: (d_out, d_in)}.
Shapes = dict[str, tuple[int, int]]
# The factors lora_up and lora_down.
Pair = tuple[Tensor, Tensor]
LAYERS = {
    "640 x 640": (640, 640),
    "1280 x 1280": (1280, 1280),
    "10240 x 1280": (10240, 1280),
    "3072 x 3072": (3072, 3072),
}


def sdxl() -> Shapes:
    """What kohya trains of SDXL: linear layers of the UNet's transformers, and of both text encoders."""
    shapes: Shapes = {}
    for block, (width, depth, count) in enumerate(
        [(640, 2, 2), (1280, 10, 2), (1280, 10, 1), (1280, 10, 3), (640, 2, 3)]
    ):
        for index in range(count):
            start = f"lora_unet_block_{block}_{index}"
            shapes |= {f"{start}_proj_in": (width, width), f"{start}_proj_out": (width, width)}
            for number in range(depth):
                inner = f"{start}_transformer_blocks_{number}"
                shapes |= {f"{inner}_attn{a}_to_{which}": (width, width) for a in (1, 2) for which in ("q", "out_0")}
                shapes |= {f"{inner}_attn1_to_{which}": (width, width) for which in "kv"}
                shapes |= {f"{inner}_attn2_to_{which}": (width, 2048) for which in "kv"}
                shapes |= {f"{inner}_ff_net_0_proj": (8 * width, width), f"{inner}_ff_net_2": (width, 4 * width)}
    for encoder, width, depth in (("te1", 768, 12), ("te2", 1280, 32)):
        for number in range(depth):
            start = f"lora_{encoder}_text_model_encoder_layers_{number}"
            shapes |= {f"{start}_self_attn_{which}_proj": (width, width) for which in ("q", "k", "v", "out")}
            shapes |= {f"{start}_mlp_fc1": (4 * width, width), f"{start}_mlp_fc2": (width, 4 * width)}
    return shapes


def flux() -> Shapes:
    """What kohya trains of Flux.1: 19 blocks of two streams, 38 of one."""
    shapes: Shapes = {}
    for number in range(19):
        for stream in ("img", "txt"):
            start = f"lora_unet_double_blocks_{number}_{stream}"
            shapes |= {f"{start}_attn_qkv": (9216, 3072), f"{start}_attn_proj": (3072, 3072)}
            shapes |= {
                f"{start}_mlp_0": (12288, 3072),
                f"{start}_mlp_2": (3072, 12288),
                f"{start}_mod_lin": (18432, 3072),
            }
    for number in range(38):
        start = f"lora_unet_single_blocks_{number}"
        shapes |= {f"{start}_linear1": (21504, 3072), f"{start}_linear2": (3072, 15360)}
        shapes |= {f"{start}_modulation_lin": (9216, 3072)}
    return shapes


FILES: dict[str, tuple[Callable[[], Shapes], int, int]] = {"sdxl": (sdxl, 64, 8), "flux": (flux, 32, 4)}


def whole(up: Tensor, down: Tensor, rank: int) -> Pair:
    """The SVD of the product."""
    u, s, vh = torch.linalg.svd(up.float() @ down.float(), full_matrices=False)
    return u[:, :rank] * s[:rank], vh[:rank]


def randomised(up: Tensor, down: Tensor, rank: int) -> Pair:
    """An approximate SVD of the product."""
    u, s, v = torch.svd_lowrank(up.float() @ down.float(), q=2 * rank, niter=2)
    return u[:, :rank] * s[:rank], v[:, :rank].mT


def ours(up: Tensor, down: Tensor, rank: int) -> Pair:
    """The same best approximation from the factors."""
    change = truncate_product(up.float(), down.float(), rank)
    return change.lora_B, change.lora_A


METHODS = {"dynrank": ours, "whole SVD": whole, "svd_lowrank": randomised}

OTHERS = [*METHODS][1:]


def factors(shape: tuple[int, int], rank: int) -> Pair:
    """Random ones, whose product has singular values of about 1 / i."""
    sizes = 1 / torch.arange(1, rank + 1)
    return torch.randn(shape[0], rank) * sizes / shape[0] ** 0.5, torch.randn(rank, shape[1]) / shape[1] ** 0.5


def excess(up: Tensor, down: Tensor, new: Pair, rank: int) -> float:
    """By what share the error of an approximation is above the least that one of its rank can have."""
    least = singular_values(up, down)[rank:].norm()
    return float(distance((up, down), new) / least) - 1


def distance(old: Pair, new: Pair) -> Tensor:
    """The norm of the difference of two products, in float64 and from their factors."""
    return singular_values(torch.cat([old[0], -new[0]], 1).double(), torch.cat([old[1], new[1]]).double()).norm()


def excess_of_file(old: Mapping[str, Tensor], new: Mapping[str, Tensor], rank: int) -> float:
    """The same of all layers of a file together."""
    error = least = 0.0
    for name in names_in(new):
        before = product(old, name)
        error += float(distance(before, product(new, name))) ** 2
        least += float(singular_values(*before)[rank:].square().sum())
    return (error / least) ** 0.5 - 1


def names_in(tensors: Mapping[str, Tensor]) -> list[str]:
    """The layers of a file."""
    return [key.removesuffix(".alpha") for key in tensors if key.endswith(".alpha")]


def product(tensors: Mapping[str, Tensor], name: str) -> Pair:
    """The factors of a layer's update, scaled."""
    up = tensors[f"{name}.lora_up.weight"].double()
    down = tensors[f"{name}.lora_down.weight"].double()
    return up * float(tensors[f"{name}.alpha"]) / len(down), down


def main(argv: list[str] | None = None) -> None:
    """Measure and print; called with a method, only do that."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="of layers")
    parser.add_argument("--turns", type=int, default=3, help="of files")
    parser.add_argument("--full-below", type=int, default=2000, help="take whole SVDs of layers no wider than this")
    parser.add_argument("--layers", nargs="*", choices=[*LAYERS], default=[*LAYERS])
    parser.add_argument("--files", nargs="*", choices=[*FILES], default=[*FILES])
    parser.add_argument(
        "--whole", nargs="*", choices=OTHERS, default=["svd_lowrank"], help="that take whole files, too"
    )
    parser.add_argument("--sampled", nargs="*", choices=OTHERS, default=["whole SVD"])
    parser.add_argument("--method", choices=[*METHODS], help=argparse.SUPPRESS)
    parser.add_argument("--job", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    if options.method:
        file, out, rank = options.job
        print(json.dumps(resize(options.method, Path(file), Path(out), int(rank))))
        return
    heads = [*METHODS, *(f"{n}, times as long" for n in OTHERS), *(f"{n}, error above least" for n in METHODS)]
    print("| layer | rank | " + " | ".join(f"{h}, ms" if h in METHODS else h for h in heads) + " |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for name in options.layers:
        one_layer(name, LAYERS[name], options)
    print("\n| file | layers | rank | MB | method | processor s | times as long | peak MiB | error above least |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name in options.files:
        one_file(name, options)


def one_layer(name: str, shape: tuple[int, int], options: argparse.Namespace, old: int = 64, new: int = 16) -> None:
    """A row of the first table."""
    up, down = factors(shape, old)
    methods = {n: m for n, m in METHODS.items() if n != "whole SVD" or max(shape) <= options.full_below}
    seconds = rounds({n: lambda m=m: m(up, down, new) for n, m in methods.items()}, options.rounds, warm_up=1)
    cells = {n: f"{statistics.median(seconds[n]) * 1e3:.1f}" for n in methods}
    times = {n: "{:.0f} ({})".format(*ratio(seconds[n], seconds["dynrank"])) for n in methods}
    errors = {n: f"{excess(up, down, m(up, down, new), new):.1e}" for n, m in methods.items()}
    row = (
        [cells.get(n, "") for n in METHODS] + [times.get(n, "") for n in OTHERS] + [errors.get(n, "") for n in METHODS]
    )
    print("| " + " | ".join([name, f"{old} → {new}", *row]) + " |", flush=True)


def one_file(name: str, options: argparse.Namespace) -> None:
    """Rows of the second table: this file by a process of each method, in turns."""
    shapes, old, new = FILES[name]
    layers = shapes()
    counts = Counter(layers.values())
    made = {shape: factors(shape, old) for shape in counts}
    few = {layer: shape for shape, layer in {shape: layer for layer, shape in layers.items()}.items()}
    runs: dict[str, list[dict[str, Any]]] = {method: [] for method in ("dynrank", *options.whole)}
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source.safetensors"
        out = Path(folder) / "out.safetensors"
        write(source, layers, made, old)
        for number in range(options.turns):
            for method in sorted(runs, reverse=bool(number % 2)):
                runs[method].append(measured(method, source, out, new))
        sizes = f"{source.stat().st_size / 1e6:.0f} → {out.stat().st_size / 1e6:.0f}"
        write(source, few, made, old)
        for method in options.sampled:
            found = measured(method, source, out, new)
            found["seconds"] = sum(found["layers"][layer] * counts[shape] for layer, shape in few.items())
            runs[f"{method}, of samples"] = [found]
    for method, found in runs.items():
        seconds, peak, error = (statistics.median(run[key] for run in found) for key in ("seconds", "peak", "excess"))
        times = statistics.median(f["seconds"] / o["seconds"] for f, o in zip(found, runs["dynrank"], strict=False))
        cells = [name, str(len(layers)), f"{old} → {new}", sizes, method, f"{seconds:.1f}", f"{times:.1f}"]
        print("| " + " | ".join([*cells, f"{peak:.0f}", f"{error:.1e}"]) + " |", flush=True)


def write(file: Path, layers: Shapes, made: Mapping[tuple[int, int], Pair], rank: int) -> None:
    """A file of these layers in half precision, with half the rank as alpha."""
    tensors: dict[str, Tensor] = {}
    for layer, shape in layers.items():
        up, down = made[shape]
        tensors |= {f"{layer}.lora_up.weight": up.half(), f"{layer}.lora_down.weight": down.half()}
        tensors[f"{layer}.alpha"] = torch.tensor(rank / 2)
    save_file(tensors, file, metadata={"ss_network_dim": str(rank)})


def measured(method: str, source: Path, out: Path, rank: int) -> dict[str, Any]:
    """What a process that resizes a file says of itself, and how good the file is."""
    out.unlink(missing_ok=True)
    said = in_a_process(method, source, out, rank)
    return {**said, "excess": excess_of_file(load_file(source), load_file(out), rank)}


def in_a_process(method: str, source: Path, out: Path, rank: int) -> dict[str, Any]:
    """What :func:`resize` says in a process of its own."""
    command = [sys.executable, __file__, "--method", method, "--job", str(source), str(out), str(rank)]
    found: dict[str, Any] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return found


def resize(method: str, file: Path, out: Path, rank: int) -> dict[str, Any]:
    """Resize a whole file: processor seconds since Python's start and of layers, and peak MiB of resident memory."""
    layers: dict[str, float] = {}
    if method == "dynrank":
        squeeze(file, out, rank=rank)
    else:
        tensors = load_file(file)
        new = dict[str, Tensor]()
        for name in names_in(tensors):
            start = time.process_time()
            up, down = METHODS[method](tensors[f"{name}.lora_up.weight"], tensors[f"{name}.lora_down.weight"], rank)
            scaling = float(tensors[f"{name}.alpha"]) / len(tensors[f"{name}.lora_down.weight"])
            new[f"{name}.lora_up.weight"] = up.half().contiguous()
            new[f"{name}.lora_down.weight"] = down.half().contiguous()
            new[f"{name}.alpha"] = torch.tensor(scaling * rank)
            layers[name] = time.process_time() - start
        save_file(new, out)
    # getrusage would say the parent's peak where that is higher.
    peak = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    return {"seconds": time.process_time(), "peak": int(peak[1]) / 2**10 if peak else 0.0, "layers": layers}


if __name__ == "__main__":
    main()
