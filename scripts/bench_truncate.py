"""Time and memory of truncating a 7B model's worth of adapters: 224 layers of 4096 x 4096, rank 32 -> 16.

The program prints one line for each measurement. For comparison it also times the dense SVD of one layer's update.
Run: .venv/bin/python scripts/bench_truncate.py [--layers N] [--size N]
"""

from __future__ import annotations

import argparse
import resource
import time

import torch
from torch import nn

from dynrank import lora_layers, resize
from dynrank.layers.kinds import LoRALinear


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=224)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--final-rank", type=int, default=16)
    parser.add_argument("--skip-dense", action="store_true", help="leave out the dense SVD (it takes long)")
    options = parser.parse_args()

    torch.manual_seed(0)
    # All layers share one frozen weight, since only the adapters matter here.
    base = nn.Linear(options.size, options.size, bias=False)
    model = nn.ModuleList(LoRALinear(base, rank=options.rank, scaling=2.0) for _ in range(options.layers))
    for _, layer in lora_layers(model):
        nn.init.normal_(layer.lora_B, std=0.01)
    first = model[0]
    delta = first.delta_weight().detach()

    before = _peak_bytes()
    start = time.perf_counter()
    reports = resize(model, options.final_rank)
    seconds = time.perf_counter() - start
    extra = _peak_bytes() - before
    print(f"threads                    {torch.get_num_threads()}")
    shape = f"{options.size} x {options.size}"
    ranks = f"{options.rank} -> {options.final_rank}"
    print(f"layers                     {len(reports)} of {shape}, {ranks}")
    print(f"truncation                 {seconds:.2f} s, {seconds / len(reports) * 1e3:.1f} ms a layer")
    print(f"peak extra memory          {extra / 2**20:.0f} MiB")
    if options.skip_dense:
        return
    start = time.perf_counter()
    values = torch.linalg.svd(delta).S
    dense = time.perf_counter() - start
    ours = torch.tensor(reports[0].singular_values)
    difference = float((values[: options.rank] - ours).abs().max() / ours[0])
    print(f"dense SVD of one layer     {dense:.1f} s, {dense / (seconds / len(reports)):.0f} times as long")
    print(f"singular values agree to   {difference:.1e} of the largest")


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
