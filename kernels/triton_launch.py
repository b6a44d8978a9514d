"""The rank-sized products of a LoRA layer on a GPU by Triton: dropout drawn in the kernels, nothing atomic.

Shape suffixes: M = tokens, I = d_in, O = d_out, N = either, R = rank, P = partial sums.

The same functions as :mod:`dynrank.kernels.torch_backend` has, for float32, bfloat16 and float16 and any strides. What
they multiply is in x's dtype, sums are in float32. Sums over tokens are split among programs and added in a second
stage in a fixed order, so a result is the same bits every time. Products of float32 are exact float32 products
(``input_precision="ieee"``), as torch's are by default: TF32 would keep 10 bits of mantissa, and a step whose time goes
into reading x gains nothing from it. Triton is imported when a kernel first runs.
"""

from __future__ import annotations

import importlib.util
import os
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dynrank.kernels.tile_table import BUCKETS, MULTIPROCESSORS, Tile, architecture_row, rank_bucket, tile

__all__ = ["NO_DROPOUT", "Dropout", "dropout", "expand", "grad_A", "grad_S_and_B", "serves", "shrink"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_SUM_BLOCK = 1024
_EXACT_STEP = 32  # a longer step of an exact float32 product, which no matrix instruction computes, spills


def serves(x: Tensor, rank: int) -> str | None:
    """None if the kernels can serve ``x`` at this rank, else why not, as a clause for an error message."""
    if rank > BUCKETS[-1]:
        return f"the Triton kernels serve ranks up to {BUCKETS[-1]}, and the rank is {rank}"
    if x.dtype not in _DTYPES:
        return f"the Triton kernels serve float32, bfloat16 and float16, and x is {str(x.dtype).removeprefix('torch.')}"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if _interpreted():
        return None
    if x.device.type != "cuda":
        return f"the Triton kernels run on a GPU, and x is on {x.device}"
    if _row_of(x.get_device()) is None:
        return f"the Triton kernels have no tile sizes for {torch.cuda.get_device_name(x.device)}"
    return None


class Dropout(NamedTuple):
    """A value is kept where its 16 random bits are below ``threshold``, and then multiplied by ``rescale``."""

    seed: Tensor | None
    threshold: int
    rescale: float


NO_DROPOUT = Dropout(None, 65536, 1.0)


def dropout(x_MI: Tensor, p: float, seed: Tensor | None) -> Dropout:
    """The dropout of ``x_MI`` with ``p`` to the nearest 1 / 65536; ``seed`` is read on the device."""
    threshold = round((1.0 - p) * 65536)
    if seed is None or threshold == 65536:
        return NO_DROPOUT
    return Dropout(seed, threshold, 65536 / threshold if threshold else 0.0)


def shrink(x_MI: Tensor, lora_A: Tensor, dropout: Dropout) -> Tensor:
    """``drop(x) A^T``, (M, R), the dtype of x."""
    (rows, d_in), rank = x_MI.shape, lora_A.shape[0]
    s_MR, A_RI = x_MI.new_empty(rows, rank), lora_A.to(x_MI.dtype)
    if s_MR.numel() == 0:
        return s_MR
    shape, options = _tiling("shrink", x_MI, rank, dropout)
    with torch.cuda.device(x_MI.get_device()):
        _kernels().shrink_kernel[(_blocks(rows, shape.rows),)](
            s_MR, x_MI, A_RI, dropout.seed,
            rows, d_in, rank, *x_MI.stride(), *A_RI.stride(), dropout.threshold, dropout.rescale, **options,
        )  # fmt: skip
    return s_MR


def expand(
    s_MR: Tensor,
    factor_RN: Tensor,
    scale: float,
    bias_N: Tensor | None,
    dropout: Dropout,
    dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:
    """``drop(scale * s factor) + bias``, (M, N) in ``dtype``, written into ``out``, contiguous, if there is one."""
    (rows, rank), width = s_MR.shape, factor_RN.shape[1]
    out_MN = s_MR.new_empty(rows, width, dtype=dtype) if out is None else out
    if out_MN.numel() == 0:
        return out_MN
    factor_RN = factor_RN.to(s_MR.dtype)
    # A transposed factor (first stride 1) has a second stride that follows from the rank, and is not specialised.
    unit_stride = factor_RN.stride(1) == 1 and factor_RN.stride(0) != 1
    shape, options = _tiling("expand", s_MR, rank, dropout)
    with torch.cuda.device(s_MR.get_device()):
        _kernels().expand_kernel[_blocks(rows, shape.rows), _blocks(width, shape.width)](
            out_MN, s_MR, factor_RN, None if bias_N is None else bias_N.contiguous(), dropout.seed,
            rows, width, rank, *s_MR.stride(), *factor_RN.stride(), dropout.threshold, scale * dropout.rescale,
            UNIT_STRIDE=unit_stride, STEP_R=min(rank_bucket(rank), _EXACT_STEP if s_MR.element_size() == 4 else 128),
            **options,
        )  # fmt: skip
    return out_MN


def grad_A(ds_MR: Tensor, x_MI: Tensor, dtype: torch.dtype, dropout: Dropout) -> Tensor:
    """``ds^T drop(x)``, (R, I), summed in float32 and stored in ``dtype``."""
    (rows, d_in), rank = x_MI.shape, ds_MR.shape[1]
    if x_MI.numel() == 0:
        return x_MI.new_zeros(rank, d_in, dtype=dtype)
    shape, options = _tiling("grad_A", x_MI, rank, dropout)
    column_blocks = _blocks(d_in, shape.width)
    rows_per_program, row_shares = _shares(x_MI, column_blocks, shape)
    partial_PRI = x_MI.new_empty(row_shares, rank, d_in, dtype=torch.float32)
    with torch.cuda.device(x_MI.get_device()):
        _kernels().grad_A_kernel[column_blocks, row_shares](
            partial_PRI, ds_MR, x_MI, dropout.seed, rows, d_in, rank, *ds_MR.stride(), *x_MI.stride(),
            rows_per_program, dropout.threshold, dropout.rescale, **options,
        )  # fmt: skip
        d_A = x_MI.new_empty(rank, d_in, dtype=dtype)
        _kernels().sum_partials_kernel[(_blocks(d_A.numel(), _SUM_BLOCK),)](
            d_A, partial_PRI, d_A.numel(), row_shares, BLOCK=_SUM_BLOCK, num_warps=4, enable_fp_fusion=True
        )
    return d_A


def grad_S_and_B(
    dy_MO: Tensor, s_MR: Tensor, lora_B: Tensor, scaling: float, needs: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """``scaling * dy B``, (M, R) in the dtype of dy, and ``scaling * dy^T s``, (O, R) in that of B, as ``needs`` says.

    The kernels that serve A compute them from these operands.
    """
    scaled = NO_DROPOUT._replace(rescale=float(scaling))  # an int would be compiled for
    B_RO = lora_B.mT.clone(memory_format=torch.contiguous_format)  # contiguous() leaves a rank of 1 its strides
    ds_MR = shrink(dy_MO, B_RO, scaled) if needs[0] else None
    return ds_MR, grad_A(s_MR, dy_MO, lora_B.dtype, scaled).mT.contiguous() if needs[1] else None


def _shares(x: Tensor, column_blocks: int, shape: Tile) -> tuple[int, int]:
    """Rows of a program, and programs along the rows, that all run at one time on the GPU; functions of sizes alone."""
    wanted = max(1, MULTIPROCESSORS[_architecture(x)] // column_blocks)
    row_blocks = _blocks(x.shape[0], shape.rows)
    blocks_per_program = _blocks(row_blocks, min(wanted, row_blocks))
    return blocks_per_program * shape.rows, _blocks(row_blocks, blocks_per_program)


def _tiling(kernel: str, x: Tensor, rank: int, dropout: Dropout) -> tuple[Tile, dict[str, Any]]:
    """The tile of a kernel, and the options that it is launched with."""
    drops = dropout.seed is not None
    shape = tile(_architecture(x), x.element_size(), f"{kernel}+drop" if drops else kernel, rank)
    sizes = {"BLOCK_M": shape.rows, "BLOCK_R": rank_bucket(rank), "SUB": shape.sub, "SLICES": shape.slices}
    # Said aloud, because Triton warns that the default of enable_fp_fusion will change.
    launch = {"num_warps": shape.warps, "num_stages": shape.stages, "enable_fp_fusion": True}
    return shape, {"DROPOUT": drops, **sizes, **launch}


def _blocks(size: int, block: int) -> int:
    return -(-size // block)


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _architecture(x: Tensor) -> str:
    row = _row_of(x.get_device())
    assert row is not None  # as serves() says
    return row


@cache
def _row_of(device: int) -> str | None:
    """The table's row for a GPU; the interpreter runs the tiles of sm_90."""
    if _interpreted():
        return "sm_90"
    from triton.runtime import driver

    with torch.cuda.device(device):
        target = driver.active.get_current_target()
    return architecture_row(target.backend, target.arch)


def _kernels() -> Any:
    from dynrank.kernels import triton_kernels

    return triton_kernels
