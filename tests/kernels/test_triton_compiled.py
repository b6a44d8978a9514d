"""The Triton kernels, compiled for each architecture without a GPU, and judged by their machine code.

They are compiled in a process of its own, as the rest of the tests runs the kernels by the interpreter.
"""

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from dynrank.kernels.triton_launch import BUCKETS, PER_MULTIPROCESSOR, ROWS, rank_bucket, tile

TRITON = importlib.metadata.version("triton") if importlib.util.find_spec("triton") else "not installed"
pytestmark = [
    pytest.mark.compiled,
    pytest.mark.skipif(
        TRITON == "not installed" or tuple(map(int, TRITON.split(".")[:2])) < (3, 9),
        reason=f"the tiles were chosen with the compiler of Triton 3.9, and Triton is {TRITON} here",
    ),
]

# KiB of shared memory of a multiprocessor, of which each program takes one more than it asks for (CUDA C++ Programming
# Guide, technical specifications by compute capability). Registers are 65536 on all of them.
SHARED_MEMORY = {80: 164, 89: 100, 90: 228, 100: 228, 120: 100}
TENSOR_CORES = {80: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}
# One rank of each bucket, none of them a multiple of 16, without dropout and with it, where most GPUs of the kind are;
# elsewhere the largest tiles with dropout: there no kernel takes more shared memory, or more than a register more.
CASES = [(90, rank, p) for rank in (8, 24, 40, 100) for p in (0, 0.1)]
CASES += [(architecture, 100, 0.1) for architecture in (80, 89, 100, 120)]
# An H100: multiprocessors, cycles a second, bytes a second (of 3.35e12, what copies reach), instructions a cycle.
MULTIPROCESSORS = 132
CLOCK = 1.755e9
BANDWIDTH = 3.0e12
ISSUED = 128


# A machine with ten other programs compiles slowly.
@pytest.mark.timeout(1800)
def test_machine_code(tmp_path):
    """One test for all of it, because compiling takes long; the process itself looks that nothing compiles later."""
    assert {rank_bucket(rank) for _, rank, _ in CASES} == set(BUCKETS)
    arguments = [f"{architecture}:{rank}:{p}" for architecture, rank, p in CASES]
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("compile_table.py"), *arguments],
        env={**os.environ, "TRITON_INTERPRET": "0", "TRITON_DEFAULT_FP_FUSION": "1", "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    kernels = json.loads(done.stdout)
    found = Counter((kernel["architecture"], kernel["kernel"]) for kernel in kernels)
    # without dropout and with it; shrink is compiled into partial sums, too, and expand with a bias
    for name, counts in {"shrink": (2, 2), "grad_A": (1, 1), "expand": (2, 1)}.items():
        for architecture in SHARED_MEMORY:
            assert found[architecture, name] == sum(counts[p > 0] for of, _, p in CASES if of == architecture), name
    for kernel in kernels:
        architecture = kernel["architecture"]
        assert kernel["spilled"] == 0, kernel
        # All programs that are launched at once run at once.
        assert PER_MULTIPROCESSOR * kernel["registers"] * kernel["threads"] <= 65536, kernel
        assert PER_MULTIPROCESSOR * (kernel["shared"] + 1024) <= 1024 * SHARED_MEMORY[architecture], kernel
        if kernel["kernel"] == "sum_partials":
            continue
        # Rank is the first dimension of grad_A's product, and the wide instructions take 64 at least.
        narrow = kernel["kernel"] == "grad_A" and rank_bucket(kernel["rank"]) < 64
        assert kernel["tensor_cores"] == ["HMMA" if narrow else TENSOR_CORES[architecture]], kernel
        if not kernel["loops"]:
            assert kernel["kernel"] == "expand", kernel
            continue
        assert not [name for name in kernel["memory"] if name.endswith(("U16", "S16"))], kernel
        loads = sum(n for name, n in kernel["memory"].items() if name.startswith("LDGSTS") and name.endswith(".128"))
        values = ROWS * tile(kernel["kernel"], kernel["rank"])[0] / kernel["threads"]
        assert loads >= values / 8, f"x is loaded 128 bits at a time: {kernel}"
        # From rank 64 on, A and ds are as much of the work as x is.
        if architecture == 90 and kernel["rank"] < 64:
            # The GPU issues so many instructions while it reads one value of x.
            budget = MULTIPROCESSORS * CLOCK * ISSUED * 2 / BANDWIDTH
            assert kernel["instructions"] / values <= budget, kernel
            assert kernel["integer"] / values <= budget / 2, kernel
