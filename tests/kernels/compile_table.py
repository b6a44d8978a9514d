"""Compiles what the Triton backend would launch on one GPU architecture, and prints what it takes there as JSON.

A process of its own, ``python compile_table.py ARCHITECTURE DTYPE=RANKS…``, as in ``90 bfloat16=8,24 float32=100``. The
backend's own functions run on CPU tensors, over a driver that names the architecture and launches nothing: so what is
compiled has the signature, the specialisation and the tile that it would have on the GPU.
"""

import io
import json
import re
import sys
from contextlib import redirect_stdout
from types import SimpleNamespace

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from dynrank.kernels import triton_launch


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


def compiled_by(runs):
    """Of each kernel that these runs of the backend compile: bytes spilled and shared, tensor cores in its PTX."""
    from dynrank.kernels import triton_kernels

    caches = {name: getattr(triton_kernels, name).device_caches[0][0] for name in triton_kernels.__all__}
    before = {name: len(cache) for name, cache in caches.items()}
    with redirect_stdout(io.StringIO()) as log:
        for options in runs:
            run_backend(**options)
    names = re.findall(r"Compiling entry function '(\w+)'", log.getvalue())
    taken = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes", log.getvalue())
    new = {name: iter([*cache.values()][before[name] :]) for name, cache in caches.items()}
    rows = []
    for name, counts in zip(names, taken, strict=True):
        kernel = next(new[name])
        tensor_cores = set(re.findall(r"\b(wgmma|tcgen05\.mma|mma\.sync)\b", kernel.asm["ptx"]))
        row = {"kernel": name, "spilled": sum(map(int, counts)), "shared": kernel.metadata.shared}
        rows.append({**row, "tensor_cores": sorted(tensor_cores)})
    assert not [name for name, rest in new.items() if list(rest)], "every compilation is in the log"
    return rows


def main(architecture, *tables):
    driver.set_active(stub_driver(int(architecture)))
    knobs.nvidia.dump_ptxas_log = True
    found = {}
    for table in tables:
        name, _, ranks = table.partition("=")
        dtype, ranks = getattr(torch, name), [int(rank) for rank in ranks.split(",")]
        found[name] = [{"rank": rank, **row} for rank in ranks for row in compiled_by([{"rank": rank, "dtype": dtype}])]
        buckets = {triton_launch.rank_bucket(rank) for rank in ranks}
        others = [rank for rank in range(1, 129) if triton_launch.rank_bucket(rank) in buckets]
        changed = {"dtype": dtype, "p": 0.3, "scaling": 0.7}
        later = compiled_by([{"rank": rank, "rows": rank, **changed} for rank in others])
        assert later == [], "another rank in a bucket, batch, p or scaling runs what is there"
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
