"""The tile table, compiled for each architecture without a GPU: no spills, shared memory, tensor cores.

Each architecture is a process of its own, as the rest of the tests runs the kernels by the interpreter.
"""

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dynrank.kernels.tile_table import BUCKETS

TRITON = importlib.metadata.version("triton") if importlib.util.find_spec("triton") else "not installed"
pytestmark = [
    pytest.mark.compiled,
    pytest.mark.skipif(
        TRITON == "not installed" or tuple(map(int, TRITON.split(".")[:2])) < (3, 9),
        reason=f"the tiles were chosen with the compiler of Triton 3.9, and Triton is {TRITON} here",
    ),
]

# Bytes of shared memory that a block may have (CUDA C++ Programming Guide, technical specifications by compute
# capability); the row of sm_80 also serves 8.6, 8.9 and 12.x, which have 99 KiB.
SHARED_MEMORY = {"sm_80": 99 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}
TENSOR_CORES = {"sm_80": "mma.sync", "sm_90": "wgmma", "sm_100": "tcgen05.mma"}
RANKS = {8: 16, 24: 32, 40: 64, 100: 128}  # one of each bucket, none of them a multiple of 16
# Every tile for the architecture that its row was made for; where a row is borrowed, the largest bucket.
COMPILED = {
    "sm_80": {"bfloat16": [*RANKS], "float32": [*RANKS]},
    "sm_90": {"bfloat16": [*RANKS], "float32": [100]},
    "sm_100": {"bfloat16": [100], "float32": [100]},
}


@pytest.mark.parametrize("architecture", COMPILED)
def test_every_kernel_fits_the_architecture(architecture, tmp_path):
    """One test for all of it, because compiling takes long; the process itself looks that nothing compiles later."""
    assert set(RANKS.values()) == set(BUCKETS)
    tables = [f"{dtype}={','.join(map(str, ranks))}" for dtype, ranks in COMPILED[architecture].items()]
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("compile_table.py"), architecture.removeprefix("sm_"), *tables],
        env={**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for dtype, kernels in json.loads(done.stdout).items():
        for rank in COMPILED[architecture][dtype]:
            names = [kernel["kernel"] for kernel in kernels if kernel["rank"] == rank]
            # with dropout and without; expand without dropout also with a bias
            assert [names.count(f"{name}_kernel") for name in ("shrink", "grad_A", "expand")] == [2, 2, 3], rank
        for kernel in kernels:
            assert kernel["spilled"] == 0, kernel
            assert kernel["shared"] <= SHARED_MEMORY[architecture], kernel
            if dtype == "float32" or kernel["kernel"] == "sum_partials_kernel":
                assert kernel["tensor_cores"] == [], "TF32 is not exact"
            # Rank is the first dimension of grad_A's product, and the wide instructions of sm_90 take 64 at least.
            elif kernel["kernel"] == "grad_A_kernel" and RANKS[kernel["rank"]] < 64:
                assert kernel["tensor_cores"] == ["mma.sync"], kernel
            else:
                assert kernel["tensor_cores"] == [TENSOR_CORES[architecture]], kernel
