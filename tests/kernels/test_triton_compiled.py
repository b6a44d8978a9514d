"""The whole tile table, compiled for each architecture without a GPU: no spills, shared memory, tensor cores.

Each combination is a process of its own, as the rest of the tests runs the kernels by the interpreter.
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
TENSOR_CORES = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA"}
RANKS = {8: 16, 24: 32, 40: 64, 100: 128}  # one of each bucket, none of them a multiple of 16


def compile_table(architecture, dtype, folder):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compile_table.py")
    done = subprocess.run(
        [sys.executable, script, architecture.removeprefix("sm_"), dtype, ",".join(map(str, RANKS))],
        env={**environment, "TRITON_CACHE_DIR": str(folder)}, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("architecture", SHARED_MEMORY)
def test_every_kernel_fits_the_architecture_in_every_bucket(architecture, dtype, tmp_path):
    """One test for all of it, because compiling takes long."""
    compiled = compile_table(architecture, dtype, tmp_path)
    kernels = compiled["kernels"]
    for rank in RANKS:
        names = [kernel["kernel"] for kernel in kernels if kernel["rank"] == rank]
        # with dropout and without; expand without dropout also with a bias
        assert [names.count(f"{name}_kernel") for name in ("shrink", "grad_A", "expand")] == [2, 2, 3], rank
    assert set(RANKS.values()) == set(BUCKETS)

    assert [kernel for kernel in kernels if kernel["spilled"]] == []
    assert [kernel for kernel in kernels if kernel["shared"] > SHARED_MEMORY[architecture]] == []

    if dtype == "bfloat16":
        products = [kernel for kernel in kernels if kernel["kernel"] != "sum_partials_kernel"]
        assert [kernel for kernel in products if not any("MMA" in name for name in kernel["products"])] == []
        for kernel in products:
            # Rank is the first dimension of grad_A's product, and the wide instructions of sm_90 take 64 at least.
            if kernel["kernel"] != "grad_A_kernel" or RANKS[kernel["rank"]] >= 64:
                assert TENSOR_CORES[architecture] in kernel["products"], kernel
    else:
        assert not any("MMA" in name for kernel in kernels for name in kernel["products"]), "TF32 is not exact"

    assert compiled["compiled_later"] == 0, "another rank in a bucket, batch, p or scaling runs what is there"
