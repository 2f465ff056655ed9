"""Linear layers of 2 to 32 rows of 16 bits on Hopper, near the rate at which memory delivers the weights.

Weights pass through a ring in shared memory, and its first slots fill while the kernel ahead still runs. The warps
share the depth of each slot and add up at the end, so that every weight and every input leaves shared memory once.
RMSNorm rides along: its weight on the input's elements, its scale on the sums.

Gluon, not Triton: a Triton loop starts its copies behind the wait for the kernel ahead, and takes an input that it
rescales through shared memory again.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from csrc_free_kernels.launch import Launcher
from csrc_free_kernels.layouts import offsets


@gluon.jit
def _copy_slot(ring, slot, p_first, i_k, o_k, m_row, K: gl.constexpr):
    """Starts the copy of what lies i_k elements further into a slot of the ring; zeros where there is nothing."""
    async_copy.async_copy_global_to_shared(ring.index(slot), p_first + i_k, mask=m_row & (i_k + o_k < K))


@gluon.jit
def _add_warps(parts, first_row: gl.constexpr, BLOCK_N: gl.constexpr, NUM_WARPS: gl.constexpr, b_y):
    """b_y plus as many rows of each warp's BLOCK_N, from first_row on, in the warps' order."""
    for i_warp in gl.static_range(NUM_WARPS):
        b_y += parts.slice(i_warp * BLOCK_N + first_row, b_y.shape[0]).load(b_y.type.layout)
    return b_y


@Launcher
@gluon.jit(do_not_specialize=["M", "N1", "N2", "N3"])
def ring_kernel(
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
    K: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    NUM_SLOTS: gl.constexpr,
    IS_GATED: gl.constexpr,
    HAS_CONSTANT_WEIGHTS: gl.constexpr,
    IS_DEPENDENT: gl.constexpr,
):
    if IS_DEPENDENT:
        gdc_launch_dependents()
    NUM_WARPS: gl.constexpr = gl.num_warps()
    DEPTH: gl.constexpr = BLOCK_K // NUM_WARPS
    # A gated tile holds rows of the gate, then as many of what it gates.
    WIDTH: gl.constexpr = BLOCK_N // 2 if IS_GATED else BLOCK_N
    dtype: gl.constexpr = p_first.dtype.element_ty
    # Sums [NUM_WARPS, BLOCK_N, BLOCK_M] of products of [NUM_WARPS, BLOCK_N, DEPTH] and [NUM_WARPS, DEPTH, BLOCK_M]
    sums: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [NUM_WARPS, 1, 1], [1, 16, 8])
    left: gl.constexpr = gl.DotOperandLayout(0, sums, 2)
    right: gl.constexpr = gl.DotOperandLayout(1, sums, 2)
    # Copies of 16 bytes a thread, neighbours along a row as far as the slot goes.
    LANES: gl.constexpr = DEPTH // 8
    PARTS: gl.constexpr = min(NUM_WARPS, 32 // LANES)
    ROWS: gl.constexpr = 32 // (LANES * PARTS)
    REST: gl.constexpr = NUM_WARPS // PARTS
    weight_copy: gl.constexpr = gl.BlockedLayout([1, 1, 8], [PARTS, ROWS, LANES], [REST, PARTS, 1], [2, 0, 1])
    input_copy: gl.constexpr = gl.BlockedLayout([1, 8, 1], [PARTS, LANES, ROWS], [REST, 1, PARTS], [1, 0, 2])

    i_tile = gl.program_id(0)
    p_weight = p_first
    num_rows = N1
    first_column = 0
    if N2 is not None:
        tiles_first = gl.cdiv(N1, WIDTH)
        tiles_second = gl.cdiv(N2, WIDTH)
        if i_tile >= tiles_first + tiles_second:
            p_weight = p_third
            num_rows = N3
            first_column = N1 + N2
            i_tile -= tiles_first + tiles_second
        elif i_tile >= tiles_first:
            p_weight = p_second
            num_rows = N2
            first_column = N1
            i_tile -= tiles_first

    o_n = offsets(1, BLOCK_N, weight_copy)
    o_wk = offsets(0, NUM_WARPS, weight_copy) * DEPTH + offsets(2, DEPTH, weight_copy)
    # Rows past the last read the last one again, and are not stored.
    o_w = gl.minimum(i_tile * WIDTH + o_n % WIDTH, num_rows - 1).to(gl.int64) * K + o_wk
    p_w = p_weight + o_w
    if IS_GATED:
        p_w = gl.where(o_n < WIDTH, p_w, p_second + o_w)
    weights = gl.allocate_shared_memory(
        dtype, [NUM_SLOTS, NUM_WARPS, BLOCK_N, DEPTH], gl.SwizzledSharedLayout(8, 1, 8, [2, 1, 0])
    )
    inputs = gl.allocate_shared_memory(
        dtype, [NUM_SLOTS, NUM_WARPS, DEPTH, BLOCK_M], gl.SwizzledSharedLayout(8, 1, 8, [1, 2, 0])
    )
    if IS_DEPENDENT and not HAS_CONSTANT_WEIGHTS:
        gdc_wait()
    for i_slot in gl.static_range(NUM_SLOTS - 1):
        _copy_slot(weights, i_slot, p_w, i_slot * BLOCK_K, o_wk, True, K)
    if IS_DEPENDENT and HAS_CONSTANT_WEIGHTS:
        gdc_wait()

    o_m = gl.program_id(1) * BLOCK_M + offsets(2, BLOCK_M, input_copy)
    o_xk = offsets(0, NUM_WARPS, input_copy) * DEPTH + offsets(1, DEPTH, input_copy)
    m_x = o_m < M
    p_x = p_input + o_m.to(gl.int64) * stride_input + o_xk
    for i_slot in gl.static_range(NUM_SLOTS - 1):
        _copy_slot(inputs, i_slot, p_x, i_slot * BLOCK_K, o_xk, m_x, K)
        async_copy.commit_group()

    o_gk = offsets(0, NUM_WARPS, right) * DEPTH + offsets(1, DEPTH, right)
    b_sums = gl.zeros([NUM_WARPS, BLOCK_N, BLOCK_M], gl.float32, sums)
    b_squares = gl.zeros([NUM_WARPS, BLOCK_M], gl.float32, gl.SliceLayout(1, right))
    full = 0
    free = NUM_SLOTS - 1
    for i_k in range(0, K, BLOCK_K):
        if p_norm is not None:
            b_g = gl.load(p_norm + i_k + o_gk, mask=i_k + o_gk < K, other=0.0).to(gl.float32)
        async_copy.wait_group(NUM_SLOTS - 2)
        i_ahead = i_k + (NUM_SLOTS - 1) * BLOCK_K
        _copy_slot(weights, free, p_w, i_ahead, o_wk, True, K)
        _copy_slot(inputs, free, p_x, i_ahead, o_xk, m_x, K)
        async_copy.commit_group()
        b_w = weights.index(full).load(left)
        b_x = inputs.index(full).load(right)
        if p_norm is not None:
            b_x32 = b_x.to(gl.float32)
            b_squares += gl.sum(b_x32 * b_x32, 1)
            b_x = (b_x32 * b_g).to(dtype)
        b_sums = mma_v2(b_w, b_x, b_sums)
        free = full
        full = gl.where(full == NUM_SLOTS - 1, 0, full + 1)
    async_copy.wait_group(0)

    # Neighbouring threads read neighbouring rows of it, and write every other column.
    swizzled: gl.constexpr = gl.SwizzledSharedLayout(8, 2, min(4, BLOCK_N // 8), [0, 1])
    shape: gl.constexpr = [NUM_WARPS * BLOCK_N, BLOCK_M]
    parts = gl.allocate_shared_memory(gl.float32, shape, swizzled, gl.reshape(b_sums, shape))
    CONTIGUOUS: gl.constexpr = min(WIDTH, 32)
    outputs: gl.constexpr = gl.BlockedLayout([1, 1], [CONTIGUOUS, 32 // CONTIGUOUS], [1, NUM_WARPS], [0, 1])
    # [WIDTH, BLOCK_M]
    b_zero = gl.zeros([WIDTH, BLOCK_M], gl.float32, outputs)
    b_y = _add_warps(parts, BLOCK_N - WIDTH, BLOCK_N, NUM_WARPS, b_zero)
    if IS_GATED:
        b_gate = _add_warps(parts, 0, BLOCK_N, NUM_WARPS, b_zero)
    if p_norm is not None:
        b_scale = gl.rsqrt(gl.sum(b_squares, 0) / K + eps)
        b_scale = gl.convert_layout(b_scale, gl.SliceLayout(0, outputs))[None, :]
        b_y *= b_scale
        if IS_GATED:
            b_gate *= b_scale
    if IS_GATED:
        b_y *= b_gate / (1.0 + gl.exp(-b_gate))
    o_row = (i_tile * WIDTH + gl.arange(0, WIDTH, layout=gl.SliceLayout(1, outputs)))[:, None]
    o_m = (gl.program_id(1) * BLOCK_M + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, outputs)))[None, :]
    m_y = (o_row < num_rows) & (o_m < M)
    o_column = first_column + o_row
    o_m = o_m.to(gl.int64)
    if p_residual is not None:
        b_y += gl.load(p_residual + o_m * stride_residual + o_column, mask=m_y, other=0.0).to(gl.float32)
    gl.store(p_output + o_m * num_columns + o_column, b_y.to(p_output.dtype.element_ty), mask=m_y)
