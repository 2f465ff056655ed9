"""The portable kernels of linear layers: one row at a time by matrix-vector products, or tiles of rows.

One row goes through a matrix-vector kernel: every thread keeps eight 16-byte loads of weights in flight, and RMSNorm,
the gate of a SwiGLU and the residual ride along in float32. More rows of 16 bits go through the tensor cores.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.target_info import is_hip

from csrc_free_kernels import dependent_launch
from csrc_free_kernels.launch import Launcher


@triton.jit
def _weight_rows(
    i_tile, p_first, p_second, p_third, N1, N2, N3, K: tl.constexpr, BLOCK_N: tl.constexpr, IS_GATED: tl.constexpr
):  # fmt: skip
    """The tile's weight rows [BLOCK_N] as pointers, its output columns, and which of these exist.

    A gated tile alternates rows of the first weight and of the second, which p_second then is the distance to, so that
    a column's two products are neighbours.
    """
    WIDTH: tl.constexpr = BLOCK_N // 2 if IS_GATED else BLOCK_N
    o_row = tl.arange(0, BLOCK_N)
    p_weight = p_first
    num_rows = N1
    first_column = 0
    if IS_GATED:
        # One base for both, since the AMD compiler knows no tile of pointers with two; and that base an integer there,
        # since from a pointer it takes offsets to stay within 2 GB. Elsewhere an integer would lose its alignment.
        distance = (o_row % 2).to(tl.int64) * p_second
        if is_hip():
            WIDTH_BYTES: tl.constexpr = p_first.dtype.element_ty.primitive_bitwidth // 8
            p_weight = (p_first.to(tl.int64) + distance * WIDTH_BYTES).to(p_first.dtype)
        else:
            p_weight = p_first + distance
        o_row = o_row // 2
    elif N2 is not None:
        tiles_first = tl.cdiv(N1, WIDTH)
        tiles_second = tl.cdiv(N2, WIDTH)
        is_first = i_tile < tiles_first
        is_second = i_tile < tiles_first + tiles_second
        # Selected, not branched upon: the AMD compiler fails on branches that yield pointers.
        p_weight = tl.where(is_first, p_first, tl.where(is_second, p_second, p_third))
        num_rows = tl.where(is_first, N1, tl.where(is_second, N2, N3))
        first_column = tl.where(is_first, 0, tl.where(is_second, N1, N1 + N2))
        i_tile -= tl.where(is_first, 0, tl.where(is_second, tiles_first, tiles_first + tiles_second))
    # Rows past the last read the last one again, and are not stored.
    o_row = tl.minimum(i_tile * WIDTH + o_row, num_rows - 1).to(tl.int64)
    o_n = i_tile * WIDTH + tl.arange(0, WIDTH)
    return p_weight + o_row * K, first_column + o_n, o_n < num_rows


@triton.jit
def _prefetch_rows(p_rows, NUM_LINES: tl.constexpr):
    """Asks for the lines at the given places of each weight row and behind them."""
    ELEMENTS: tl.constexpr = dependent_launch.LINE_BYTES // (p_rows.dtype.element_ty.primitive_bitwidth // 8)
    dependent_launch.prefetch_l2(p_rows[:, None] + tl.arange(0, NUM_LINES)[None, :] * ELEMENTS)


@triton.jit
def _load(p, m, IS_MASKED: tl.constexpr):
    """A tile of weights, each element of which is read once."""
    if IS_MASKED:
        return tl.load(p, mask=m, other=0.0, eviction_policy="evict_first")
    else:
        return tl.load(p, eviction_policy="evict_first")


@triton.jit
def _load_input(p_x, p_norm, o_k, K: tl.constexpr, IS_MASKED: tl.constexpr):
    """A piece of the input row in float32, times the norm's weight if there is a norm, and its squares before that."""
    if IS_MASKED:
        b_x = tl.load(p_x, mask=o_k < K, other=0.0).to(tl.float32)
    else:
        b_x = tl.load(p_x).to(tl.float32)
    b_square = b_x * b_x
    if p_norm is not None:
        if IS_MASKED:
            b_x *= tl.load(p_norm + o_k, mask=o_k < K, other=0.0).to(tl.float32)
        else:
            b_x *= tl.load(p_norm + o_k).to(tl.float32)
    return b_x, b_square


@triton.jit
def _gate(b_pairs):
    """silu(gate) * up of products that stand in pairs, [..., 2]."""
    b_gate, b_up = tl.split(b_pairs)
    return b_gate / (1.0 + tl.exp(-b_gate)) * b_up


@Launcher
@triton.jit(do_not_specialize=["N1", "N2", "N3"], do_not_specialize_on_alignment=["M"])
def row_kernel(
    p_input,
    p_norm,
    eps,
    p_residual,
    p_output,
    p_first,
    p_second,
    p_third,
    M,
    N1,
    N2,
    N3,
    num_columns,
    stride_input,
    stride_residual,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    IS_GATED: tl.constexpr,
    HAS_CONSTANT_WEIGHTS: tl.constexpr,
    NUM_LINES: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
):
    dependent_launch.launch_dependents(IS_DEPENDENT)
    # Neighbours take the same weights for different rows, so that the L2 serves all but the first.
    i_m = (tl.program_id(0) % M).to(tl.int64)
    i_tile = tl.program_id(0) // M
    p_rows, o_column, m_column = _weight_rows(
        i_tile, p_first, p_second, p_third, N1, N2, N3, K, BLOCK_N, IS_GATED
    )  # fmt: skip
    o_k = tl.arange(0, BLOCK_K)
    p_x = p_input + i_m * stride_input + o_k
    p_w = p_rows[:, None] + o_k[None, :]
    # While the kernel ahead still runs, the first weights come to the registers, or at least to the L2, and the next to
    # the L2.
    if HAS_CONSTANT_WEIGHTS:
        b_w = _load(p_w, (o_k < K)[None, :], K < BLOCK_K)
        if IS_DEPENDENT and K > BLOCK_K:
            _prefetch_rows(p_rows + BLOCK_K, NUM_LINES)
    elif IS_DEPENDENT:
        _prefetch_rows(p_rows, NUM_LINES)
    dependent_launch.wait(IS_DEPENDENT)
    if not HAS_CONSTANT_WEIGHTS:
        b_w = _load(p_w, (o_k < K)[None, :], K < BLOCK_K)

    b_residual = 0.0
    if p_residual is not None:
        p_r = p_residual + i_m * stride_residual + o_column
        b_residual = tl.load(p_r, mask=m_column, other=0.0).to(tl.float32)
    b_x, b_square = _load_input(p_x, p_norm, o_k, K, K < BLOCK_K)
    b_sum = b_w.to(tl.float32) * b_x[None, :]
    for i_k in tl.range(BLOCK_K, K, BLOCK_K):
        b_w = _load(p_w + i_k, (i_k + o_k < K)[None, :], K % BLOCK_K != 0)
        b_x, b_more = _load_input(p_x + i_k, p_norm, i_k + o_k, K, K % BLOCK_K != 0)
        b_square += b_more
        b_sum += b_w.to(tl.float32) * b_x[None, :]

    b_y = tl.sum(b_sum, 1)
    if p_norm is not None:
        b_y *= tl.rsqrt(tl.sum(b_square, 0) / K + eps)
    if IS_GATED:
        b_y = _gate(tl.reshape(b_y, [BLOCK_N // 2, 2]))
    b_y += b_residual
    tl.store(p_output + i_m * num_columns + o_column, b_y.to(p_output.dtype.element_ty), mask=m_column)


@Launcher
@triton.jit(do_not_specialize=["M", "N1", "N2", "N3"])
def tile_kernel(
    p_input,
    p_residual,
    p_output,
    p_first,
    p_second,
    p_third,
    M,
    N1,
    N2,
    N3,
    num_columns,
    stride_input,
    stride_residual,
    K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    IS_GATED: tl.constexpr,
    NUM_LINES: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
):
    MASK_K: tl.constexpr = K % BLOCK_K != 0
    dependent_launch.launch_dependents(IS_DEPENDENT)
    p_rows, o_column, m_column = _weight_rows(
        tl.program_id(0), p_first, p_second, p_third, N1, N2, N3, K, BLOCK_N, IS_GATED
    )  # fmt: skip
    if IS_DEPENDENT:
        _prefetch_rows(p_rows, NUM_LINES)
    dependent_launch.wait(IS_DEPENDENT)

    o_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = (o_m < M)[:, None]
    o_m = o_m.to(tl.int64)[:, None]
    m_y = m_m & m_column[None, :]
    b_residual = 0.0
    if p_residual is not None:
        p_r = p_residual + o_m * stride_residual + o_column[None, :]
        b_residual = tl.load(p_r, mask=m_y, other=0.0).to(tl.float32)
    o_k = tl.arange(0, BLOCK_K)
    p_x = p_input + o_m * stride_input + o_k[None, :]
    p_w = p_rows[:, None] + o_k[None, :]
    b_y = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for i_k in tl.range(0, K, BLOCK_K):
        m_k = (i_k + o_k < K)[None, :]
        b_x = tl.load(p_x + i_k, mask=m_m & m_k if MASK_K else m_m, other=0.0).to(DOT_DTYPE)
        b_w = _load(p_w + i_k, m_k, MASK_K).to(DOT_DTYPE)
        b_y = tl.dot(b_x, tl.trans(b_w), b_y, input_precision="ieee")
    if IS_GATED:
        b_y = _gate(tl.reshape(b_y, [BLOCK_M, BLOCK_N // 2, 2]))
    b_y += b_residual
    p_y = p_output + o_m * num_columns + o_column[None, :]
    tl.store(p_y, b_y.to(p_output.dtype.element_ty), mask=m_y)
