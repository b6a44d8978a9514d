"""Compiles what the Triton backend would launch on one GPU architecture, and prints what it takes there as JSON.

A process of its own, ``python compile_table.py ARCHITECTURE DTYPE RANKS``, as in ``90 bfloat16 8,24``. The backend's
own functions run on CPU tensors, over a driver that names the architecture and launches nothing: so what is compiled
has the signature, the specialisation and the tile that it would have on the GPU.
"""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from dynrank.kernels import triton_launch

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def stub_driver(architecture):
    properties = {"max_shared_mem": 10**9}  # the test compares with the real limit
    return SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", architecture, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        launcher_cls=lambda source, metadata: lambda *arguments: None,
        utils=SimpleNamespace(
            get_device_properties=lambda device: properties,
            load_binary=lambda *arguments: (None, None, 0, 0, 1024),
            unload_module=lambda *arguments: None,
        ),
    )


def run_backend(rank, dtype, rows=200, p=0.1, scaling=2.0, d_in=512, d_out=768):
    """Every function of the backend as forward and backward call it, with dropout and without."""
    x, dy = torch.zeros(rows, d_in, dtype=dtype), torch.zeros(rows, d_out, dtype=dtype)
    a, b = torch.zeros(rank, d_in, dtype=dtype), torch.zeros(d_out, rank, dtype=dtype)
    bias, seed = torch.zeros(d_out, dtype=dtype), torch.zeros((), dtype=torch.int64)
    for rate in (0.0, p):
        drop = triton_launch.dropout(x, rate, seed)
        s = triton_launch.shrink(x, a, drop)
        triton_launch.grad_A(s, x, dtype, drop)
        triton_launch.expand(s, a, 1.0, None, drop, dtype)
    triton_launch.expand(s, b.mT, scaling, bias, triton_launch.NO_DROPOUT, dtype)
    triton_launch.grad_S_and_B(dy, s, b, scaling, (True, True))


def resources(kernel):
    """What ptxas says of a compiled kernel, and which matrix instructions it has."""
    binary = Path(kernel.metadata_group[f"{kernel.name}.cubin"])
    usage = subprocess.run([TOOLS / "cuobjdump", "-res-usage", binary], capture_output=True, text=True, check=True)
    code = subprocess.run([TOOLS / "nvdisasm", binary], capture_output=True, text=True, check=True)
    taken = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage.stdout)}
    return {
        "registers": taken["REG"],
        "spilled": taken["STACK"] + taken["LOCAL"],
        "shared": kernel.metadata.shared,
        "warps": kernel.metadata.num_warps,
        "products": sorted(set(re.findall(r"\b(HGMMA|UTC\w*MMA|HMMA|FFMA)\b", code.stdout))),
    }


def compiled_kernels():
    """{name: the kernels that were compiled under it so far, in their order}."""
    from dynrank.kernels import triton_kernels

    kernels = {name: getattr(triton_kernels, name) for name in triton_kernels.__all__}
    return {name: [*kernel.device_caches[0][0].values()] for name, kernel in kernels.items()}


def main(architecture, dtype, ranks):
    driver.set_active(stub_driver(int(architecture)))
    dtype, ranks = getattr(torch, dtype), [int(rank) for rank in ranks.split(",")]
    rows, counts = [], {}
    for rank in ranks:
        run_backend(rank, dtype)
        for name, kernels in compiled_kernels().items():
            rows += [{"kernel": name, "rank": rank, **resources(kernel)} for kernel in kernels[counts.get(name, 0) :]]
            counts[name] = len(kernels)
    buckets = {triton_launch.rank_bucket(rank) for rank in ranks}
    for rank in range(1, 129):  # nothing here may compile: the launches themselves do nothing
        if triton_launch.rank_bucket(rank) in buckets:
            run_backend(rank, dtype, rows=rank, p=0.3, scaling=0.7)
    compiled_later = sum(map(len, compiled_kernels().values())) - sum(counts.values())
    print(json.dumps({"kernels": rows, "compiled_later": compiled_later}))


if __name__ == "__main__":
    main(*sys.argv[1:])
