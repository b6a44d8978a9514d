"""The Triton kernels of the low-rank update; only :mod:`dynrank.kernels.triton_launch` imports them, at first use.

Shape suffixes: M = tokens, I = d_in, N = d_in or d_out, R = rank, Q = columns of a tile, P = partial sums.

The dropout mask depends only on (seed, row, column), so every kernel and every tile size draws the same mask.
Philox4x32-10 (Salmon et al., 2011, "Parallel random numbers: as easy as 1, 2, 3") with key ``seed`` and counter
``(column // 8, row, 0, 0)`` gives 128 bits for eight neighbours in a row. Each value takes 16 of them, low halves
first, and is kept if they are below ``threshold``. A thread that loads 128 bits of 16-bit numbers holds exactly these
eight values, so it makes their mask with one call, which costs less than the memory pass.

Rank is a run-time number and no kernel is specialised for it: all ranks in one bucket run the same binary. s and ds
are as wide as the bucket, BLOCK_R, so that they are loaded 128 bits at a time at every rank. Their columns beyond the
rank are multiplied by zero or not stored. Offsets are 64-bit, because M * I exceeds 2^31 at 512k tokens of width 4096.
"""

import triton
import triton.language as tl


@triton.jit
def _philox(seed_ptr, row_M1, counter_1Q):
    """The four words of Philox4x32-10 for each row and counter, (M, Q) each."""
    seed = tl.load(seed_ptr).to(tl.uint64, bitcast=True)
    key_0 = (seed & 0xFFFFFFFF).to(tl.uint32)
    key_1 = (seed >> 32).to(tl.uint32)
    # Round 1 without the terms that the two zero words cancel. Words that depend only on the row, or only on the
    # column, stay (M, 1) or (1, Q) until round 3 combines them.
    product_0 = counter_1Q.to(tl.uint64) * 0xD2511F53
    c0 = row_M1.to(tl.uint32) ^ key_0
    c1 = tl.full([1, 1], 0, tl.uint32)
    c2 = (product_0 >> 32).to(tl.uint32) ^ key_1
    c3 = product_0.to(tl.uint32)
    for _ in tl.static_range(9):
        key_0 = tl.add(key_0, 0x9E3779B9, sanitize_overflow=False)
        key_1 = tl.add(key_1, 0xBB67AE85, sanitize_overflow=False)
        # One instruction makes both halves of the product.
        product_0 = c0.to(tl.uint64) * 0xD2511F53
        product_2 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (product_2 >> 32).to(tl.uint32) ^ c1 ^ key_0
        c2 = (product_0 >> 32).to(tl.uint32) ^ c3 ^ key_1
        c1 = product_2.to(tl.uint32)
        c3 = product_0.to(tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def _dropped(x_MQ, seed_ptr, row_M, start, threshold):
    """``x``, of 16-bit numbers, with the dropped ones set to zero; its first column is ``start``, a multiple of 8."""
    counter_Q = start // 8 + tl.arange(0, x_MQ.shape[1] // 8)
    c0, c1, c2, c3 = _philox(seed_ptr, row_M[:, None], counter_Q[None, :])
    words = tl.join(tl.join(c0, c2), tl.join(c1, c3))
    halves = tl.join(words & 0xFFFF, words >> 16).to(tl.int32)
    ones_where_kept = tl.reshape(((halves - threshold) >> 31).to(tl.int16), x_MQ.shape)
    return (x_MQ.to(tl.int16, bitcast=True) & ones_where_kept).to(x_MQ.dtype, bitcast=True)


@triton.jit(do_not_specialize=["rows", "rank", "steps", "threshold"])
def shrink_kernel(
    # (P, M, BLOCK_R), contiguous: drop(x) lora_A^T over each program's columns.
    s_ptr,
    # (M, I), each row contiguous.
    x_ptr,
    # (R, I), contiguous.
    a_ptr,
    seed_ptr,
    rows,
    d_in,
    rank,
    stride_xm,
    # How many times WIDTH columns each program reads.
    steps,
    threshold,
    # 1 / keep rate.
    scale,
    DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """A program owns BLOCK_M rows and loops over its part of the columns."""
    row_M = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    rank_R = tl.arange(0, BLOCK_R)
    row_is_real = row_M[:, None] < rows
    x_row_ptr = x_ptr + row_M[:, None] * stride_xm
    a_row_ptr = a_ptr + rank_R[None, :].to(tl.int64) * d_in
    s_MR = tl.full([BLOCK_M, BLOCK_R], 0.0, tl.float32)
    first = tl.program_id(1) * steps
    for step in range(first, first + steps):
        start = step * WIDTH
        column_Q = start + tl.arange(0, WIDTH)
        column_is_real = column_Q < d_in
        x_MQ = tl.load(x_row_ptr + column_Q[None, :], mask=row_is_real & column_is_real[None, :], other=0.0)
        a_is_real = column_is_real[:, None] & (rank_R[None, :] < rank)
        a_QR = tl.load(a_row_ptr + column_Q[:, None], mask=a_is_real, other=0.0)
        if DROPOUT:
            x_MQ = _dropped(x_MQ, seed_ptr, row_M, start, threshold)
        s_MR = tl.dot(x_MQ, a_QR, s_MR)
    s_row = tl.program_id(1).to(tl.int64) * rows + row_M
    s_MR = (s_MR * scale).to(s_ptr.dtype.element_ty)
    tl.store(s_ptr + s_row[:, None] * BLOCK_R + rank_R[None, :], s_MR, mask=row_is_real)


@triton.jit(do_not_specialize=["rows", "rank", "threshold"])
def expand_kernel(
    # (M, N), contiguous: mask * (scale * s factor + bias).
    out_ptr,
    # (M, BLOCK_R), contiguous.
    s_ptr,
    # (R, N), contiguous.
    factor_ptr,
    # (N,), contiguous, or None.
    bias_ptr,
    seed_ptr,
    rows,
    width,
    rank,
    threshold,
    # 1 / keep rate.
    scale,
    DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """A program owns a tile of the output."""
    row_M = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    rank_R = tl.arange(0, BLOCK_R)
    start = tl.program_id(1) * WIDTH
    column_Q = start + tl.arange(0, WIDTH)
    row_is_real = row_M[:, None] < rows
    column_is_real = column_Q[None, :] < width
    s_MR = tl.load(s_ptr + row_M[:, None] * BLOCK_R + rank_R[None, :], mask=row_is_real, other=0.0)
    factor_RQ = tl.load(
        factor_ptr + rank_R[:, None].to(tl.int64) * width + column_Q[None, :],
        mask=(rank_R[:, None] < rank) & column_is_real,
        other=0.0,
    )
    out_MQ = tl.dot(s_MR, factor_RQ) * scale
    if bias_ptr is not None:
        out_MQ += tl.load(bias_ptr + column_Q[None, :], mask=column_is_real, other=0.0).to(tl.float32)
    out_MQ = out_MQ.to(out_ptr.dtype.element_ty)
    if DROPOUT:
        out_MQ = _dropped(out_MQ, seed_ptr, row_M, start, threshold)
    out_row_ptr = out_ptr + row_M[:, None] * width
    tl.store(out_row_ptr + column_Q[None, :], out_MQ, mask=row_is_real & column_is_real)


@triton.jit(do_not_specialize=["rows", "rank", "steps", "threshold"])
def grad_A_kernel(
    # (P, R, I) float32, contiguous: ds^T drop(x) of each program's rows.
    partial_ptr,
    # (M, BLOCK_R), contiguous.
    ds_ptr,
    # (M, I), each row contiguous.
    x_ptr,
    seed_ptr,
    rows,
    d_in,
    rank,
    stride_xm,
    # How many times BLOCK_M rows each program reads.
    steps,
    threshold,
    # 1 / keep rate.
    scale,
    DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """A program owns WIDTH columns and loops over its part of the rows."""
    rank_R = tl.arange(0, BLOCK_R)
    start = tl.program_id(0) * WIDTH
    column_Q = start + tl.arange(0, WIDTH)
    column_is_real = column_Q[None, :] < d_in
    first = tl.program_id(1).to(tl.int64) * steps
    sum_RQ = tl.full([BLOCK_R, WIDTH], 0.0, tl.float32)
    for step in range(steps):
        row_M = (first + step) * BLOCK_M + tl.arange(0, BLOCK_M)
        row_is_real = row_M[:, None] < rows
        ds_MR = tl.load(ds_ptr + row_M[:, None] * BLOCK_R + rank_R[None, :], mask=row_is_real, other=0.0)
        x_ptr_MQ = x_ptr + row_M[:, None] * stride_xm + column_Q[None, :]
        x_MQ = tl.load(x_ptr_MQ, mask=row_is_real & column_is_real, other=0.0)
        if DROPOUT:
            x_MQ = _dropped(x_MQ, seed_ptr, row_M, start, threshold)
        sum_RQ = tl.dot(tl.trans(ds_MR), x_MQ, sum_RQ)
    partial_row = tl.program_id(1).to(tl.int64) * rank + rank_R
    tl.store(
        partial_ptr + partial_row[:, None] * d_in + column_Q[None, :],
        sum_RQ * scale,
        mask=(rank_R[:, None] < rank) & column_is_real,
    )


@triton.jit(do_not_specialize=["rows", "partials"])
def sum_partials_kernel(
    # (rows, columns), or (columns, rows) if TRANSPOSED, contiguous.
    out_ptr,
    # (P, rows, columns) float32, contiguous.
    partial_ptr,
    rows,
    columns,
    partials,
    TRANSPOSED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """The second stage of a sum: it adds the partial sums in a fixed order."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    column = tl.program_id(1).to(tl.int64) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)[None, :]
    is_real = (row < rows) & (column < columns)
    offset = row * columns + column
    total = tl.full([BLOCK_ROWS, BLOCK_COLUMNS], 0.0, tl.float32)
    for partial in range(partials):
        start = partial * tl.cast(rows, tl.int64) * columns
        total += tl.load(partial_ptr + start + offset, mask=is_real, other=0.0)
    if TRANSPOSED:
        offset = column * rows + row
    tl.store(out_ptr + offset, total.to(out_ptr.dtype.element_ty), mask=is_real)
