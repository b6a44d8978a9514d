"""The Triton kernels of the low-rank update; imported by :mod:`dynrank.kernels.triton_launch` alone, at first use.

Shape suffixes: M = tokens, I = d_in, O = d_out, N = either, R = rank, S = ranks of a step, Q = columns of
a sub-tile, P = partial sums.

The dropout mask is a function of (seed, row, column) alone, so every kernel and every tile size draws the same one.
Philox4x32-10 (Salmon et al., 2011, "Parallel random numbers: as easy as 1, 2, 3") with key ``seed`` and counter
``(32 * (column // 256) + column % 32, row, 0, 0)`` gives 128 bits for the eight columns of a row that are 32 apart.
The one in sub-tile ``column % 256 // 32`` takes 16 of them, low halves first, and is kept where they are below
``threshold``. One call for eight values keeps the generator cheaper than the memory pass that it hides behind.

Rank is a run-time number below BLOCK_R, and nothing that follows from it is specialised: another rank in the same
bucket runs the same binary. Offsets are 64-bit, as M * I passes 2^31 at 512k tokens of width 4096.
"""

import triton
import triton.language as tl

__all__ = ["expand_kernel", "grad_A_kernel", "shrink_kernel", "sum_partials_kernel"]


@triton.jit
def _philox(seed_ptr, row_M1, counter_1Q):
    """The four words of Philox4x32-10 for each row and counter, (M, Q) each."""
    seed = tl.load(seed_ptr).to(tl.uint64, bitcast=True)
    key_0 = (seed & 0xFFFFFFFF).to(tl.uint32)
    key_1 = (seed >> 32).to(tl.uint32)
    # Round 1, with what its two zero words cancel left out. Words of the row or of the column alone stay that small
    # until they meet in round 3.
    counter_1Q = counter_1Q.to(tl.uint32)
    c0 = row_M1.to(tl.uint32) ^ key_0
    c1 = tl.full([1, 1], 0, tl.uint32)
    c2 = tl.umulhi(counter_1Q, 0xD2511F53) ^ key_1
    c3 = tl.mul(counter_1Q, 0xD2511F53, sanitize_overflow=False)
    for _ in tl.static_range(9):
        key_0 = tl.add(key_0, 0x9E3779B9, sanitize_overflow=False)
        key_1 = tl.add(key_1, 0xBB67AE85, sanitize_overflow=False)
        old_0 = c0
        old_2 = c2
        c0 = tl.umulhi(old_2, 0xCD9E8D57) ^ c1 ^ key_0
        c2 = tl.umulhi(old_0, 0xD2511F53) ^ c3 ^ key_1
        c1 = tl.mul(old_2, 0xCD9E8D57, sanitize_overflow=False)
        c3 = tl.mul(old_0, 0xD2511F53, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def _mask_words(seed_ptr, row_M, start, SUB: tl.constexpr, SLICES: tl.constexpr):
    """The words whose 16-bit slices serve the SLICES sub-tiles that begin at column ``start``."""
    tl.static_assert(SUB == 32, "a sub-tile of the mask has 32 columns")
    tl.static_assert((SLICES == 4) or (SLICES == 8), "a tile under dropout has 4 or 8 sub-tiles")
    counter_Q = start // 256 * 32 + tl.arange(0, SUB)
    c0, c1, c2, c3 = _philox(seed_ptr, row_M[:, None], counter_Q[None, :])
    if SLICES == 4:
        second_half = start % 256 != 0
        c0 = tl.where(second_half, c2, c0)
        c1 = tl.where(second_half, c3, c1)
    return c0, c1, c2, c3


@triton.jit
def _dropped(x, words, threshold, SLICE: tl.constexpr):
    """``x`` with the bits of dropped values cleared; no tile of booleans, which cannot be laid out for a product."""
    bits = ((words[SLICE // 2] >> (16 * (SLICE % 2))) & 0xFFFF).to(tl.int32)
    ones_where_kept = (bits - threshold) >> 31
    BITS: tl.constexpr = tl.int32 if x.dtype == tl.float32 else tl.int16
    return (x.to(BITS, bitcast=True) & ones_where_kept.to(BITS)).to(x.dtype, bitcast=True)


@triton.jit(do_not_specialize=["rows", "rank", "threshold"])
def shrink_kernel(
    s_ptr,  # (M, R), contiguous: drop(x) lora_A^T
    x_ptr,  # (M, I)
    a_ptr,  # (R, I)
    seed_ptr,
    rows,
    d_in,
    rank,
    stride_xm,
    stride_xi,
    stride_ar,
    stride_ai,
    threshold,
    scale,  # 1 / keep rate
    DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SUB: tl.constexpr,
    SLICES: tl.constexpr,
):
    """A program owns BLOCK_M rows and walks over the columns."""
    row_M = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    rank_R = tl.arange(0, BLOCK_R)
    row_is_real = row_M[:, None] < rows
    x_row_ptr = x_ptr + row_M[:, None] * stride_xm
    a_row_ptr = a_ptr + rank_R[None, :].to(tl.int64) * stride_ar
    s_MR = tl.full([BLOCK_M, BLOCK_R], 0.0, tl.float32)
    for start in range(0, d_in, SUB * SLICES):
        if DROPOUT:
            words = _mask_words(seed_ptr, row_M, start, SUB, SLICES)
        for part in tl.static_range(SLICES):
            column_Q = start + part * SUB + tl.arange(0, SUB)
            column_is_real = column_Q < d_in
            x_MQ = tl.load(
                x_row_ptr + column_Q[None, :].to(tl.int64) * stride_xi,
                mask=row_is_real & column_is_real[None, :],
                other=0.0,
            )
            a_QR = tl.load(
                a_row_ptr + column_Q[:, None].to(tl.int64) * stride_ai,
                mask=column_is_real[:, None] & (rank_R[None, :] < rank),
                other=0.0,
            )
            if DROPOUT:
                x_MQ = _dropped(x_MQ, words, threshold, part)
            s_MR = tl.dot(x_MQ, a_QR, s_MR, input_precision="ieee")
    s_MR = (s_MR * scale).to(s_ptr.dtype.element_ty)
    tl.store(s_ptr + row_M[:, None] * rank + rank_R[None, :], s_MR, mask=row_is_real & (rank_R[None, :] < rank))


@triton.jit
def _load_ranks(row_ptr, stride, rank_S, rank, row_is_real):
    return tl.load(
        row_ptr + rank_S[None, :].to(tl.int64) * stride, mask=row_is_real & (rank_S[None, :] < rank), other=0.0
    )


@triton.jit(do_not_specialize=["rows", "rank", "stride_sm", "stride_fn", "threshold"])
def expand_kernel(
    out_ptr,  # (M, N), contiguous: scale * mask * (s factor) + bias
    s_ptr,  # (M, R)
    factor_ptr,  # (R, N)
    bias_ptr,  # (N,), contiguous, or None
    seed_ptr,
    rows,
    width,
    rank,
    stride_sm,
    stride_sr,
    stride_fr,
    stride_fn,
    threshold,
    scale,  # 1 / keep rate
    DROPOUT: tl.constexpr,
    UNIT_STRIDE: tl.constexpr,  # stride_fn is 1
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    STEP_R: tl.constexpr,
    SUB: tl.constexpr,
    SLICES: tl.constexpr,
):
    """A program owns a tile of the output; the rank is one step of the product, or several."""
    row_M = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_is_real = row_M[:, None] < rows
    start = tl.program_id(1) * (SUB * SLICES)
    s_row_ptr = s_ptr + row_M[:, None] * stride_sm
    rank_S = tl.arange(0, STEP_R)
    if STEP_R == BLOCK_R:
        s_MS = _load_ranks(s_row_ptr, stride_sr, rank_S, rank, row_is_real)
    if DROPOUT:
        words = _mask_words(seed_ptr, row_M, start, SUB, SLICES)
    for part in tl.static_range(SLICES):
        column_Q = start + part * SUB + tl.arange(0, SUB)
        column_is_real = column_Q < width
        offset_Q = column_Q.to(tl.int64) if UNIT_STRIDE else column_Q.to(tl.int64) * stride_fn
        out_MQ = tl.full([BLOCK_M, SUB], 0.0, tl.float32)
        for first in range(0, BLOCK_R, STEP_R):
            rank_S = first + tl.arange(0, STEP_R)
            if STEP_R != BLOCK_R:
                s_MS = _load_ranks(s_row_ptr, stride_sr, rank_S, rank, row_is_real)
            factor_SQ = tl.load(
                factor_ptr + rank_S[:, None].to(tl.int64) * stride_fr + offset_Q[None, :],
                mask=(rank_S[:, None] < rank) & column_is_real[None, :],
                other=0.0,
            )
            out_MQ = tl.dot(s_MS, factor_SQ, out_MQ, input_precision="ieee")
        if DROPOUT:
            out_MQ = _dropped(out_MQ, words, threshold, part)
        out_MQ = out_MQ * scale
        if bias_ptr is not None:
            out_MQ += tl.load(bias_ptr + column_Q, mask=column_is_real, other=0.0).to(tl.float32)[None, :]
        tl.store(
            out_ptr + row_M[:, None] * width + column_Q[None, :],
            out_MQ.to(out_ptr.dtype.element_ty),
            mask=row_is_real & column_is_real[None, :],
        )


@triton.jit(do_not_specialize=["rows", "rank", "stride_dm", "rows_per_program", "threshold"])
def grad_A_kernel(
    partial_ptr,  # (P, R, I) float32, contiguous: ds^T drop(x) of each program's rows
    ds_ptr,  # (M, R)
    x_ptr,  # (M, I)
    seed_ptr,
    rows,
    d_in,
    rank,
    stride_dm,
    stride_dr,
    stride_xm,
    stride_xi,
    rows_per_program,  # a multiple of BLOCK_M
    threshold,
    scale,  # 1 / keep rate
    DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SUB: tl.constexpr,
    SLICES: tl.constexpr,
):
    """A program owns SLICES * SUB columns and walks over its share of the rows."""
    rank_R = tl.arange(0, BLOCK_R)
    start = tl.program_id(0) * (SUB * SLICES)
    first = tl.program_id(1).to(tl.int64) * rows_per_program
    zero = tl.full([BLOCK_R, SUB], 0.0, tl.float32)
    sums = (zero,) * SLICES
    for step in range(0, rows_per_program, BLOCK_M):
        row_M = first + step + tl.arange(0, BLOCK_M)
        row_is_real = row_M < rows
        ds_RM = tl.load(
            ds_ptr + row_M[None, :] * stride_dm + rank_R[:, None].to(tl.int64) * stride_dr,
            mask=row_is_real[None, :] & (rank_R[:, None] < rank),
            other=0.0,
        )
        if DROPOUT:
            words = _mask_words(seed_ptr, row_M, start, SUB, SLICES)
        new_sums = ()
        for part in tl.static_range(SLICES):
            column_Q = start + part * SUB + tl.arange(0, SUB)
            x_MQ = tl.load(
                x_ptr + row_M[:, None] * stride_xm + column_Q[None, :].to(tl.int64) * stride_xi,
                mask=row_is_real[:, None] & (column_Q[None, :] < d_in),
                other=0.0,
            )
            if DROPOUT:
                x_MQ = _dropped(x_MQ, words, threshold, part)
            new_sums = new_sums + (tl.dot(ds_RM, x_MQ, sums[part], input_precision="ieee"),)
        sums = new_sums
    partial_row = tl.program_id(1).to(tl.int64) * rank + rank_R
    for part in tl.static_range(SLICES):
        column_Q = start + part * SUB + tl.arange(0, SUB)
        tl.store(
            partial_ptr + partial_row[:, None] * d_in + column_Q[None, :],
            sums[part] * scale,
            mask=(rank_R[:, None] < rank) & (column_Q[None, :] < d_in),
        )


@triton.jit(do_not_specialize=["numel", "partials"])
def sum_partials_kernel(
    out_ptr,  # numel values, contiguous
    partial_ptr,  # (P, numel) float32, contiguous
    numel,
    partials,
    BLOCK: tl.constexpr,
):
    """The second stage of a sum: the partial sums, added in their order whatever finished first."""
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_real = offset < numel
    total = tl.full([BLOCK], 0.0, tl.float32)
    for partial in range(partials):
        total += tl.load(partial_ptr + partial * tl.cast(numel, tl.int64) + offset, mask=is_real, other=0.0)
    tl.store(out_ptr + offset, total.to(out_ptr.dtype.element_ty), mask=is_real)
