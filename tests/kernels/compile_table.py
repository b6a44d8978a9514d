"""Compiles what the Triton backend would launch on GPU architectures, and prints what it takes there as JSON.

A process of its own, ``python compile_table.py ARCHITECTURE:RANK:P…``, as in ``90:8:0 90:8:0.1``; P is of dropout.
The backend's own functions run on CPU tensors, over a driver that names the architecture and launches nothing: so what
is compiled has the signature, the specialisation and the tile that it would have on the GPU.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from dynrank.kernels import triton_launch
from dynrank.kernels.triton_launch import NO_DROPOUT, rank_bucket

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
TENSOR_CORES = r"(HMMA|HGMMA|UTCHMMA)\b"
# What the integer unit does, at half the rate at which instructions are issued.
INTEGER = r"(IADD|VIADD|LOP|PLOP|SHF|PRMT|ISETP|SEL|LEA|IMNMX|VIMNMX)"


def stub_driver(architecture):
    # No kernel is refused here for its shared memory, because the test compares it with the real limit.
    properties = {"max_shared_mem": 10**9}
    return SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", architecture, 32),
        # Triton keeps what it compiles apart by device, so the architecture stands for the device.
        get_current_device=lambda: architecture,
        get_current_stream=lambda device: 0,
        launcher_cls=lambda source, metadata: lambda *arguments: None,
        utils=SimpleNamespace(
            get_device_properties=lambda device: properties,
            load_binary=lambda *arguments: (None, None, 0, 0, 1024),
            unload_module=lambda *arguments: None,
        ),
    )


def run_backend(rank, p, rows=200, scaling=2.0, d_in=2048, d_out=768):
    """The backend's functions as forward and backward call them: those with dropout, or at p of 0 those without.

    Yields what has been called after each.
    """
    x, dy, bias = (torch.zeros(*shape, dtype=torch.bfloat16) for shape in ((rows, d_in), (rows, d_out), (d_out,)))
    a = torch.zeros(rank, d_in)
    b = torch.zeros(d_out, rank)
    seed = torch.zeros((), dtype=torch.int64)
    drop = triton_launch.dropout(x, p, seed)
    suffix = "+drop" if p else ""
    for at_once in (1, 264):
        triton_launch._programs_at_once = lambda device, at_once=at_once: at_once
        s = triton_launch.shrink(x, a, drop)
        yield f"shrink{suffix}"
    triton_launch.grad_A(s, x, a.dtype, drop)
    yield f"grad_A{suffix}"
    triton_launch.expand(s, a, 1.0, None, drop, x.dtype)
    yield f"expand{suffix}"
    if not p:
        triton_launch.expand(s, b.mT, scaling, bias, NO_DROPOUT, x.dtype)
        yield "expand+bias"
        triton_launch.grad_S_and_B(dy, s, b, scaling, (True, True))
        yield "grad_S_and_B"


def compiled_by(architecture, rank, p, **sizes):
    """(what was called, the name of a kernel, the kernel) for each that this run of the backend compiles."""
    from dynrank.kernels import triton_kernels

    driver.set_active(stub_driver(architecture))
    caches = {
        name: getattr(triton_kernels, name).device_caches[architecture][0]
        for name in dir(triton_kernels)
        if name.endswith("_kernel")
    }
    known = {name: len(cache) for name, cache in caches.items()}
    for called in run_backend(rank, p, **sizes):
        for name, cache in caches.items():
            for kernel in [*cache.values()][known[name] :]:
                yield called, name.removesuffix("_kernel"), kernel
            known[name] = len(cache)


def facts(called, name, kernel):
    """What the machine code of a kernel takes; of its instructions, those of the loop with the matrix instructions.

    Sums are no matrix products, and to write a kernel's instructions out takes as long as to compile it.
    """
    dumped = ["--dump-resource-usage"] if name == "sum_partials" else ["--dump-resource-usage", "-sass"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        text = subprocess.run([CUOBJDUMP, *dumped, file.name], capture_output=True, text=True, check=True).stdout
    taken = {what: int(count) for what, count in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    code = [(int(at, 16), line) for at, line in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\d+ )?(.*?);", text)]
    multiplies = [at for at, line in code if re.match(TENSOR_CORES, line)]
    jumps = [(int(line.split()[-1], 16), at) for at, line in code if re.match(r"BRA\b.* 0x", line)]
    loops = [(first, last) for first, last in jumps if any(first <= at <= last for at in multiplies)]
    first, last = max(loops, key=lambda loop: loop[1] - loop[0], default=(0, float("inf")))
    count = Counter(line.split()[0] for at, line in code if first <= at <= last)
    return {
        "called": called,
        "kernel": name,
        "registers": taken["REG"],
        "spilled": taken["STACK"] + taken["LOCAL"],
        "shared": kernel.metadata.shared,
        "threads": 32 * kernel.metadata.num_warps,
        "loops": bool(loops),
        "tensor_cores": sorted({re.match(TENSOR_CORES, line)[1] for at, line in code if at in multiplies}),
        "instructions": count.total(),
        "integer": sum(number for operation, number in count.items() if re.match(INTEGER, operation)),
        "memory": {op: number for op, number in count.items() if re.match(r"(LD|ST|UTMA|UBLK)", op)},
    }


def main(*cases):
    cases = [(int(architecture), int(rank), float(p)) for architecture, rank, p in (case.split(":") for case in cases)]
    found = [
        {"architecture": architecture, "rank": rank, **facts(*compiled)}
        for architecture, rank, p in cases
        for compiled in compiled_by(architecture, rank, p)
    ]
    for architecture, like, p in cases:
        for rank in [rank for rank in range(1, 129) if rank_bucket(rank) == rank_bucket(like)]:
            later = [*compiled_by(architecture, rank, p and 0.3, rows=rank, scaling=0.7)]
            assert later == [], "another rank in a bucket, batch, p or scaling runs what is there"
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
