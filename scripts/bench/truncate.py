"""Time and memory of a whole change of ranks at the size of a 7B model: 224 layers of 4096 x 4096, AdamW.

One pool of parameters is shared out by the importance of layers in two steps with random gradients; factors are
truncated, and the optimizer's moments are carried along. The program prints one line for each measurement: what
importance adds to a step beside the step of AdamW, the change, its memory. For comparison it also times the dense SVD
of one layer's update. On a CPU it needs Linux.
Run: .venv/bin/python scripts/bench/truncate.py [--layers N] [--size N] [--rank N] [--final-rank N] [--device cuda]
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from dynrank import RankDriver, Training, adapter_parameters, resize
from dynrank.layers.kinds import LoRALinear
from dynrank.schedules import Stage
from dynrank.targets import Budget
from dynrank.triggers import At, Run


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=224)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--final-rank", type=int, default=16)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--skip-dense", action="store_true", help="leave out the dense SVD (it takes long)")
    options = parser.parse_args()

    torch.manual_seed(0)
    # All layers share one frozen weight, since only the adapters matter here.
    base = nn.Linear(options.size, options.size, bias=False, device=options.device)
    layers = [LoRALinear(base, rank=options.rank, scaling=2.0) for _ in range(options.layers)]
    model = nn.ModuleList(layers).to(options.device)
    for layer in layers:
        nn.init.normal_(layer.lora_B, std=0.01)
    optimizer = torch.optim.AdamW(adapter_parameters(model), lr=1e-3)
    loop = Training(model, [optimizer])
    driver = RankDriver(Stage(At(step=2), Budget(final_rank=options.final_rank)))
    driver.start(loop, Run(total_steps=4))
    while loop.step < 2:
        for factor in adapter_parameters(model):
            factor.grad = torch.randn_like(factor)
        stepping = _seconds(optimizer.step)
        loop.step += 1
        importance = _seconds(lambda: driver.end_step(loop))
        optimizer.zero_grad()

    delta = layers[0].delta_weight().detach()
    (report,) = resize(model, {"0": 1}, dry_run=True, optimizers=())
    before = _peak_bytes(options.device, reset=True)
    seconds = _seconds(lambda: driver.advance(loop))
    extra = _peak_bytes(options.device) - before
    where = torch.cuda.get_device_name() if options.device == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"on                         {where}")
    print(f"a step of AdamW            {stepping * 1e3:.1f} ms")
    print(f"importance, a step         {importance * 1e3:.1f} ms")
    shape = f"{options.size} x {options.size}"
    ranks = f"{options.rank} -> {options.final_rank}"
    print(f"layers                     {options.layers} of {shape}, {ranks}")
    print(f"change                     {seconds:.2f} s, {seconds / options.layers * 1e3:.1f} ms a layer")
    print(f"peak extra memory          {extra / 2**20:.0f} MiB")
    if options.skip_dense:
        return
    start = time.perf_counter()
    values = torch.linalg.svd(delta).S
    dense = time.perf_counter() - start
    ours = torch.tensor(report.singular_values)
    difference = float((values[: options.rank] - ours).abs().max() / ours[0])
    print(f"dense SVD of one layer     {dense:.1f} s, {dense / (seconds / options.layers):.0f} times as long")
    print(f"singular values agree to   {difference:.1e} of the largest")


def _seconds(function: Callable[[], object]) -> float:
    """From before to after, with all that the GPU does for it."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _peak_bytes(device: str, reset: bool = False) -> int:
    """The largest memory since the last reset, which sets it to the present one: the process's, or the GPU's."""
    if device == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    found = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text(encoding="ascii"))
    assert found is not None
    return int(found[1]) * 1024


if __name__ == "__main__":
    main()
