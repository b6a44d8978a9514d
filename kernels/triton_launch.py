"""The products of a LoRA layer with A and B on a GPU by Triton: the kernels draw dropout's mask and use no atomics.

Shape suffixes: M = tokens, I = d_in, O = d_out, N = either, R = rank, P = partial sums.

The functions are those of :mod:`dynrank.kernels.torch_backend`, for bfloat16 and float16 and any strides. Factors are
in the dtype of x, sums in float32. A long sum is divided among as many programs as the GPU runs at one time; a second
stage adds their partial sums in a fixed order, so every run gives the same bits. Triton is imported at the first call.
"""

import importlib.util
import os
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

_DTYPES = (torch.bfloat16, torch.float16)
# Every rank above one bucket and up to the next runs the same binary. A matrix instruction takes at least 16.
BUCKETS = (16, 32, 64, 128)
# Tile sizes are constants and are not tuned at run time, so that two runs add in the same order. Compiled for compute
# capability 8.0, 8.9, 9.0, 10.0 and 12.0, no tile spills a register, and a multiprocessor can hold PER_MULTIPROCESSOR
# programs at once. Four warps share 64 rows: eight would compute the mask of a product's first operand twice.
ROWS = 64
WARPS = 4
PER_MULTIPROCESSOR = 2
# For each bucket: the columns of a tile of ROWS tokens, and the stages of its loop (loads in flight).
TILES = {
    "shrink": ((128, 2), (128, 2), (64, 3), (32, 3)),
    "expand": ((128, 1), (128, 1), (128, 1), (128, 1)),
    "grad_A": ((128, 2), (128, 2), (128, 2), (64, 2)),
}
# Options of every kernel. enable_fp_fusion is explicit, because Triton warns that its default will change.
_OPTIONS = {"num_warps": WARPS, "enable_fp_fusion": True}


def unsupported(x: Tensor, rank: int) -> str | None:
    """The reason why the kernels do not support ``x`` at this rank, for an error message; None if they do."""
    if rank > BUCKETS[-1]:
        return f"the rank must be at most {BUCKETS[-1]} for the Triton kernels, got {rank}"
    if x.dtype not in _DTYPES:
        return f"x must be bfloat16 or float16 for the Triton kernels, got {str(x.dtype).removeprefix('torch.')}"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if _interpreted():
        return None
    if x.device.type != "cuda" or torch.version.hip is not None:
        return f"x must be on an NVIDIA GPU for the Triton kernels, got {x.device}"
    if torch.cuda.get_device_capability(x.device) < (8, 0):
        return f"the Triton kernels need compute capability 8.0, which {torch.cuda.get_device_name(x.device)} lacks"
    return None


class Dropout(NamedTuple):
    """A value is kept if its 16 random bits are below ``threshold``, and is then multiplied by ``rescale``."""

    seed: Tensor | None
    threshold: int
    rescale: float


NO_DROPOUT = Dropout(None, 65536, 1.0)


def seed_place(x: Tensor) -> torch.device:
    """The device of the seed: that of ``x``, because the kernels read it."""
    return x.device


def dropout(x_MI: Tensor, p: float, seed: Tensor | None) -> Dropout:
    """The dropout of ``x_MI`` with ``p`` rounded to a multiple of 1 / 65536; no dropout without a seed."""
    threshold = round((1.0 - p) * 65536)
    if seed is None or threshold == 65536:
        return NO_DROPOUT
    return Dropout(seed, threshold, 65536 / threshold if threshold else 0.0)


def rank_bucket(rank: int) -> int:
    """The smallest bucket of at least ``rank``."""
    return next(bucket for bucket in BUCKETS if rank <= bucket)


def tile(kernel: str, rank: int) -> tuple[int, int]:
    """(columns, stages) of ``kernel`` at ``rank``."""
    return TILES[kernel][BUCKETS.index(rank_bucket(rank))]


def shrink(x_MI: Tensor, lora_A: Tensor, dropout: Dropout) -> Tensor:
    """``drop(x) A^T``, (M, R) in the dtype of x; a view of rows as wide as the rank's bucket."""
    x_MI, A_RI = _contiguous_rows(x_MI), _contiguous(lora_A, x_MI.dtype)
    rows, d_in = x_MI.shape
    rank = lora_A.shape[0]
    bucket = rank_bucket(lora_A.shape[0])
    s_MR = x_MI.new_empty(rows, bucket)[:, :rank]
    if s_MR.numel() == 0:
        return s_MR
    options = _options("shrink", rank, dropout)
    row_blocks = _blocks(rows, ROWS)
    width = options["WIDTH"]
    steps, shares = _shares(x_MI, _blocks(d_in, width), row_blocks, least=8 * bucket // width)
    partial_PMR = s_MR if shares == 1 else x_MI.new_empty(shares, rows, bucket, dtype=torch.float32)
    with torch.cuda.device(x_MI.get_device()):
        _kernels().shrink_kernel[row_blocks, shares](
            partial_PMR, x_MI, A_RI, dropout.seed,
            rows, d_in, rank, x_MI.stride(0), steps, dropout.threshold, dropout.rescale, **options,
        )  # fmt: skip
        if shares > 1:
            _sum(partial_PMR, s_MR, BLOCK_ROWS=64, BLOCK_COLUMNS=16)
    return s_MR


def expand(
    s_MR: Tensor,
    factor_RN: Tensor,
    scale: float,
    bias_N: Tensor | None,
    dropout: Dropout,
    dtype: torch.dtype,
) -> Tensor:
    """``drop(scale * s factor + bias)``, (M, N) in ``dtype``, contiguous."""
    rows, rank = s_MR.shape
    width = factor_RN.shape[1]
    out_MN = s_MR.new_empty(rows, width, dtype=dtype)
    if out_MN.numel() == 0:
        return out_MN
    options = _options("expand", rank, dropout)
    with torch.cuda.device(s_MR.get_device()):
        _kernels().expand_kernel[_blocks(rows, ROWS), _blocks(width, options["WIDTH"])](
            out_MN, _bucket_wide(s_MR), _contiguous(factor_RN, s_MR.dtype),
            None if bias_N is None else bias_N.contiguous(), dropout.seed,
            rows, width, rank, dropout.threshold, scale * dropout.rescale, **options,
        )  # fmt: skip
    return out_MN


def grad_A(ds_MR: Tensor, x_MI: Tensor, dtype: torch.dtype, dropout: Dropout, *, transposed: bool = False) -> Tensor:
    """``ds^T drop(x)``, (R, I), or (I, R) if ``transposed``; summed in float32 and stored in ``dtype``."""
    rows, d_in = x_MI.shape
    rank = ds_MR.shape[1]
    out = x_MI.new_empty((d_in, rank) if transposed else (rank, d_in), dtype=dtype)
    if x_MI.numel() == 0:
        return out.zero_()
    x_MI = _contiguous_rows(x_MI)
    ds_MR = _bucket_wide(ds_MR)
    options = _options("grad_A", rank, dropout)
    column_blocks = _blocks(d_in, options["WIDTH"])
    steps, shares = _shares(x_MI, _blocks(rows, ROWS), column_blocks, least=8 * options["BLOCK_R"] // ROWS)
    partial_PRI = x_MI.new_empty(shares, rank, d_in, dtype=torch.float32)
    with torch.cuda.device(x_MI.get_device()):
        _kernels().grad_A_kernel[column_blocks, shares](
            partial_PRI, ds_MR, x_MI, dropout.seed,
            rows, d_in, rank, x_MI.stride(0), steps, dropout.threshold, dropout.rescale, **options,
        )  # fmt: skip
        _sum(partial_PRI, out, BLOCK_ROWS=16, BLOCK_COLUMNS=64, TRANSPOSED=transposed)
    return out


def grad_S_and_B(
    dy_MO: Tensor, s_MR: Tensor, lora_B: Tensor, scaling: float, needs: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """``scaling * dy B``, (M, R) in dy's dtype, and ``scaling * dy^T s``, (O, R) in B's; None where not needed."""
    # Triton would compile another binary for an int.
    scaled = NO_DROPOUT._replace(rescale=float(scaling))
    ds_MR = shrink(dy_MO, lora_B.mT, scaled) if needs[0] else None
    return ds_MR, grad_A(s_MR, dy_MO, lora_B.dtype, scaled, transposed=True) if needs[1] else None


def _sum(partial: Tensor, out: Tensor, *, TRANSPOSED: bool = False, **block: int) -> None:
    """Write the sum over the first dimension of ``partial`` into ``out``."""
    partials, rows, columns = partial.shape
    grid = _blocks(rows, block["BLOCK_ROWS"]), _blocks(columns, block["BLOCK_COLUMNS"])
    _kernels().sum_partials_kernel[grid](
        out, partial, rows, columns, partials, TRANSPOSED=TRANSPOSED, **block, **_OPTIONS
    )


def _shares(x: Tensor, blocks: int, others: int, least: int) -> tuple[int, int]:
    """(blocks per program, programs) along the dimension of ``blocks`` blocks that is summed over.

    Together with the ``others`` programs along the other dimension they are as many as the GPU runs at one time. Each
    program sums at least ``least`` blocks, so that partial sums are at most half as large as the input. The order of a
    sum depends only on sizes and on the GPU.
    """
    wanted = max(1, min(_programs_at_once(x.get_device()) // others, blocks // least))
    steps = _blocks(blocks, wanted)
    return steps, _blocks(blocks, steps)


@cache
def _programs_at_once(device: int) -> int:
    """How many programs the GPU runs at one time; under the interpreter, as many as an H100."""
    multiprocessors = 132 if _interpreted() else torch.cuda.get_device_properties(device).multi_processor_count
    return multiprocessors * PER_MULTIPROCESSOR


def _options(kernel: str, rank: int, dropout: Dropout) -> dict[str, Any]:
    """The compile-time constants of a kernel."""
    width, stages = tile(kernel, rank)
    sizes = {"BLOCK_M": ROWS, "BLOCK_R": rank_bucket(rank), "WIDTH": width, "num_stages": stages}
    return {"DROPOUT": dropout.seed is not None, **sizes, **_OPTIONS}


def _contiguous(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor``, contiguous and in ``dtype``, by at most one copy."""
    if tensor.dtype == dtype and tensor.is_contiguous():
        return tensor
    return tensor.new_empty(tensor.shape, dtype=dtype).copy_(tensor)


def _contiguous_rows(x_MN: Tensor) -> Tensor:
    """``x`` with each row contiguous; the stride between rows may be any."""
    return x_MN if x_MN.stride(1) == 1 else x_MN.contiguous()


def _bucket_wide(s_MR: Tensor) -> Tensor:
    """``s`` in rows as wide as the rank's bucket; no copy if :func:`shrink` made it."""
    bucket = rank_bucket(s_MR.shape[1])
    if s_MR.stride() == (bucket, 1) and s_MR.storage_offset() % bucket == 0:
        return s_MR
    return torch.nn.functional.pad(s_MR, (0, bucket - s_MR.shape[1])).contiguous()


def _blocks(size: int, block: int) -> int:
    return -(-size // block)


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _kernels() -> Any:
    from dynrank.kernels import triton_kernels

    return triton_kernels
