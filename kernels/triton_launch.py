"""The low-rank update's products on a GPU by Triton: dropout drawn in the kernels, sums in float32, nothing atomic.

Shape suffixes: M = tokens, I = d_in, O = d_out, N = either, R = rank, P = partial sums.

All operands have one dtype (float32, bfloat16 or float16) and any strides. Sums over tokens are split among programs
and added in a second stage in a fixed order, so a result is the same bits every time. Products of float32 are exact
float32 products (``input_precision="ieee"``), as torch's are by default: TF32 would keep 10 bits of mantissa, and a
step whose time goes into reading x gains nothing from it. Triton is imported when a kernel first runs.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from dynrank.kernels.tile_table import BUCKETS, MULTIPROCESSORS, Tile, architecture_row, rank_bucket, tile

__all__ = ["expand", "grad_A", "grad_S_and_B", "serves", "shrink"]

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


def shrink(x_MI: Tensor, lora_A_RI: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """``drop(x) lora_A^T``, (M, R), the dtype of x.

    Args:
        x_MI: the tokens.
        lora_A_RI: the dtype of x.
        p: the share of x that is dropped, in [0, 1], to the nearest 1/65536; what is kept is divided by its share.
        seed: int64, 0-d, on the device of x; read on the device. May be None where p is 0.
    """
    return _shrink(x_MI, lora_A_RI, _Dropout.of(p, seed), 1.0)


def expand(s_MR: Tensor, factor_RN: Tensor, bias_N: Tensor | None, p: float, seed: Tensor | None) -> Tensor:
    """``mask * (s factor) / keep rate + bias``, (M, N), the dtype of s; ``p`` and ``seed`` as for :func:`shrink`."""
    (rows, rank), width = s_MR.shape, factor_RN.shape[1]
    out_MN = s_MR.new_empty(rows, width)
    if out_MN.numel() == 0:
        return out_MN
    # A transposed factor (first stride 1) has a second stride that follows from the rank, and is not specialised.
    unit_stride = factor_RN.stride(1) == 1 and factor_RN.stride(0) != 1
    dropout = _Dropout.of(p, seed)
    shape = _tile("expand", s_MR, rank, dropout)
    with torch.cuda.device(s_MR.get_device()):
        _kernels().expand_kernel[_blocks(rows, shape.rows), _blocks(width, shape.width)](
            out_MN, s_MR, factor_RN, None if bias_N is None else bias_N.contiguous(), dropout.seed,
            rows, width, rank, *s_MR.stride(), *factor_RN.stride(), dropout.threshold, dropout.scale,
            UNIT_STRIDE=unit_stride, STEP_R=min(rank_bucket(rank), _EXACT_STEP if s_MR.element_size() == 4 else 128),
            **_sub_tiles(shape, rank, dropout),
        )  # fmt: skip
    return out_MN


def grad_A(ds_MR: Tensor, x_MI: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """``ds^T drop(x)``, (R, I), the dtype of x; ``p`` and ``seed`` as for :func:`shrink`."""
    return _grad_A(ds_MR, x_MI, _Dropout.of(p, seed), 1.0)


def grad_S_and_B(dy_MO: Tensor, s_MR: Tensor, lora_B_OR: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """``scaling * dy lora_B``, (M, R), and ``scaling * dy^T s``, (O, R), both in the dtype of dy, reading dy once.

    In the largest bucket dy is read twice: a program cannot hold enough columns there, and the float32 partial sums of
    one pass would be more bytes than dy.
    """
    (rows, d_out), rank = dy_MO.shape, s_MR.shape[1]
    shape = tile(_architecture(dy_MO), dy_MO.element_size(), "grad_S_and_B", rank)
    if shape is None:
        ds_MR = _shrink(dy_MO, lora_B_OR.mT.contiguous(), _NO_DROPOUT, scaling)
        return ds_MR, _grad_A(s_MR, dy_MO, _NO_DROPOUT, scaling).mT
    if dy_MO.numel() == 0:
        return dy_MO.new_zeros(rows, rank), dy_MO.new_zeros(d_out, rank)
    column_blocks = _blocks(d_out, shape.width)
    rows_per_program, row_shares = _shares(dy_MO, column_blocks, shape)
    ds_PMR = dy_MO.new_empty(column_blocks, rows, rank, dtype=torch.float32)
    db_POR = dy_MO.new_empty(row_shares, d_out, rank, dtype=torch.float32)
    with torch.cuda.device(dy_MO.get_device()):
        _kernels().grad_S_and_B_kernel[column_blocks, row_shares](
            ds_PMR, db_POR, dy_MO, s_MR, lora_B_OR,
            rows, d_out, rank, *dy_MO.stride(), *s_MR.stride(), *lora_B_OR.stride(), rows_per_program,
            BLOCK_M=shape.rows, BLOCK_R=rank_bucket(rank), BLOCK_O=shape.width, **_launch(shape),
        )  # fmt: skip
    return _sum_partials(ds_PMR, scaling, dy_MO.dtype), _sum_partials(db_POR, scaling, dy_MO.dtype)


@dataclass(frozen=True)
class _Dropout:
    """A value is kept where its 16 random bits are below ``threshold``, and then multiplied by ``scale``."""

    seed: Tensor | None
    threshold: int
    scale: float

    @classmethod
    def of(cls, p: float, seed: Tensor | None) -> _Dropout:
        threshold = round((1.0 - p) * 65536)
        if threshold == 65536:
            return _NO_DROPOUT
        return cls(seed, threshold, 65536 / threshold if threshold else 0.0)

    @property
    def drops(self) -> bool:
        return self.threshold < 65536


_NO_DROPOUT = _Dropout(None, 65536, 1.0)


def _shrink(x_MI: Tensor, a_RI: Tensor, dropout: _Dropout, factor: float) -> Tensor:
    (rows, d_in), rank = x_MI.shape, a_RI.shape[0]
    s_MR = x_MI.new_empty(rows, rank)
    if s_MR.numel() == 0:
        return s_MR
    shape = _tile("shrink", x_MI, rank, dropout)
    with torch.cuda.device(x_MI.get_device()):
        _kernels().shrink_kernel[(_blocks(rows, shape.rows),)](
            s_MR, x_MI, a_RI, dropout.seed,
            rows, d_in, rank, *x_MI.stride(), *a_RI.stride(), dropout.threshold, factor * dropout.scale,
            **_sub_tiles(shape, rank, dropout),
        )  # fmt: skip
    return s_MR


def _grad_A(ds_MR: Tensor, x_MI: Tensor, dropout: _Dropout, factor: float) -> Tensor:
    (rows, d_in), rank = x_MI.shape, ds_MR.shape[1]
    if x_MI.numel() == 0:
        return x_MI.new_zeros(rank, d_in)
    shape = _tile("grad_A", x_MI, rank, dropout)
    column_blocks = _blocks(d_in, shape.width)
    rows_per_program, row_shares = _shares(x_MI, column_blocks, shape)
    partial_PRI = x_MI.new_empty(row_shares, rank, d_in, dtype=torch.float32)
    with torch.cuda.device(x_MI.get_device()):
        _kernels().grad_A_kernel[column_blocks, row_shares](
            partial_PRI, ds_MR, x_MI, dropout.seed,
            rows, d_in, rank, *ds_MR.stride(), *x_MI.stride(), rows_per_program, dropout.threshold, dropout.scale,
            **_sub_tiles(shape, rank, dropout),
        )  # fmt: skip
    return _sum_partials(partial_PRI, factor, x_MI.dtype)


def _sum_partials(partial: Tensor, factor: float, dtype: torch.dtype) -> Tensor:
    """``factor`` times the sum over the first dimension, in its order."""
    out = partial.new_empty(partial.shape[1:], dtype=dtype)
    with torch.cuda.device(partial.get_device()):
        _kernels().sum_partials_kernel[(_blocks(out.numel(), _SUM_BLOCK),)](
            out, partial, out.numel(), partial.shape[0], float(factor),
            BLOCK=_SUM_BLOCK, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return out


def _shares(x: Tensor, column_blocks: int, shape: Tile) -> tuple[int, int]:
    """Rows of a program, and programs along the rows, that occupy the GPU once; functions of sizes alone."""
    wanted = _blocks(MULTIPROCESSORS[_architecture(x)], column_blocks)
    row_blocks = _blocks(x.shape[0], shape.rows)
    blocks_per_program = _blocks(row_blocks, min(wanted, row_blocks))
    return blocks_per_program * shape.rows, _blocks(row_blocks, blocks_per_program)


def _tile(kernel: str, x: Tensor, rank: int, dropout: _Dropout) -> Tile:
    name = f"{kernel}+drop" if dropout.drops else kernel
    found = tile(_architecture(x), x.element_size(), name, rank)
    assert found is not None
    return found


def _sub_tiles(shape: Tile, rank: int, dropout: _Dropout) -> dict[str, Any]:
    return {
        "DROPOUT": dropout.drops,
        "BLOCK_M": shape.rows,
        "BLOCK_R": rank_bucket(rank),
        "SUB": shape.sub,
        "SLICES": shape.slices,
        **_launch(shape),
    }


def _launch(shape: Tile) -> dict[str, Any]:
    # Said aloud, because Triton warns that the default of enable_fp_fusion will change.
    return {"num_warps": shape.warps, "num_stages": shape.stages, "enable_fp_fusion": True}


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
