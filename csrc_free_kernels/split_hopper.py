"""What the split-KV kernels in Gluon have in common: attention of a few rows over a program's share of a range.

Its tiles pass through a ring in shared memory. Of each tile a warp has slots of its own, with a running maximum and
sums of its own: no data crosses warps in the loop, though all of them meet at its barriers. At the end their results
are added up through shared memory.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from csrc_free_kernels import combine, dependent_launch, masks, softmax
from csrc_free_kernels.layouts import offsets

# All there are: left to itself, ptxas spills for the sake of a third program, which shared memory has no room for.
MAX_REGISTERS = 255


@gluon.constexpr_function
def output_layout(BLOCK_D, NUM_WARPS):
    """Of [1, rows, BLOCK_D]: 16 bytes a thread, a row in as few warps as can be."""
    LANES = min(32, BLOCK_D // 4)
    return gl.BlockedLayout([1, 1, 4], [1, 32 // LANES, LANES], [1, NUM_WARPS, 1], [2, 1, 0])


@gluon.jit
def make_queries(dtype: gl.constexpr, BLOCK_M: gl.constexpr, HELD_ROWS: gl.constexpr, BLOCK_D: gl.constexpr):
    """Room for [1, BLOCK_M, BLOCK_D], of which the first HELD_ROWS can be written. The others may hold anything: a row
    of scores comes from one row of queries."""
    layout: gl.constexpr = gl.SwizzledSharedLayout(8, 1, min(8, HELD_ROWS), [2, 1, 0])
    return gl.allocate_shared_memory(dtype, [1, BLOCK_M, BLOCK_D], layout)


@gluon.jit
def make_ring(p_key, p_value, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, NUM_SLOTS: gl.constexpr):
    """(keys, values, p_key, p_value, rows, columns): shared memory for NUM_SLOTS tiles of one head, its addresses, and
    what a thread copies of a tile."""
    W: gl.constexpr = gl.num_warps()
    LANES: gl.constexpr = BLOCK_D // 8
    copy: gl.constexpr = gl.BlockedLayout([1, 1, 8], [1, 32 // LANES, LANES], [W, 1, 1], [2, 1, 0])
    shape: gl.constexpr = [NUM_SLOTS, W, BLOCK_N // W, BLOCK_D]
    swizzled: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8, [2, 1, 0])
    keys = gl.allocate_shared_memory(p_key.dtype.element_ty, shape, swizzled)
    values = gl.allocate_shared_memory(p_key.dtype.element_ty, shape, swizzled)
    o_n = offsets(0, W, copy) * (BLOCK_N // W) + offsets(1, BLOCK_N // W, copy)
    return keys, values, p_key, p_value, o_n, offsets(2, BLOCK_D, copy)


@gluon.jit
def load_range_hint(p_range, stride_range, i_b, S):
    """(start, end) as `masks.load_kv_range` has them, while the kernel ahead may be changing them.

    Every thread loads for itself, and two of them may find different numbers. What follows from these decides at which
    barriers a warp stops, so all take what one has left in shared memory.
    """
    if p_range is None:
        start, end = masks.load_kv_range(p_range, stride_range, i_b, S)
    else:
        layout: gl.constexpr = gl.BlockedLayout([2], [32], [gl.num_warps()], [0])
        plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
        o_bound = gl.arange(0, 2, layout=layout)
        b_range = gl.load(p_range + i_b * stride_range[0] + o_bound * stride_range[1], volatile=True)
        b_range = gl.allocate_shared_memory(gl.int32, [2], plain, b_range).load(layout)
        start, end = masks.clamp_range(
            gl.sum(gl.where(o_bound == 0, b_range, 0), 0), gl.sum(gl.where(o_bound == 1, b_range, 0), 0), S
        )
    return start, end


@gluon.jit
def prefetch(
    ring, first, step, S, STRIDE_K: gl.constexpr, STRIDE_V: gl.constexpr, D: gl.constexpr, SLOTS: gl.constexpr
):  # fmt: skip
    """Asks for the share's first SLOTS slots. The range may be about to change: any slot of the cache will do."""
    keys, _, p_key, p_value, _, _ = ring
    BLOCK_N: gl.constexpr = keys.shape[1] * keys.shape[2]
    NUM_LINES: gl.constexpr = keys.shape[3] // 64
    layout: gl.constexpr = gl.BlockedLayout([1, 1], [32, 1], [gl.num_warps(), 1], [0, 1])
    o_ahead = gl.arange(0, SLOTS, layout=gl.SliceLayout(1, layout))
    o_slot = first + o_ahead // BLOCK_N * step + o_ahead % BLOCK_N
    o_slot = gl.maximum(gl.minimum(o_slot, S - 1), 0).to(gl.int64)[:, None]
    o_line = gl.minimum(gl.arange(0, NUM_LINES, layout=gl.SliceLayout(0, layout)) * 64, D - 1)[None, :]
    if S > 0:
        dependent_launch.prefetch_l2(p_key + o_slot * STRIDE_K + o_line)
        dependent_launch.prefetch_l2(p_value + o_slot * STRIDE_V + o_line)


@gluon.jit
def _copy_tile(tiles, slot, p_rows, o_n, o_d, i_n, high, STRIDE: gl.constexpr, D: gl.constexpr):
    """Starts the copy of the slots from i_n on, zeros from high on, if any lies before it. One group of copies."""
    BLOCK_N: gl.constexpr = tiles.shape[1] * tiles.shape[2]
    p_tile = p_rows + i_n.to(gl.int64) * STRIDE + (o_n * STRIDE + o_d)
    if tiles.shape[3] != D:
        if i_n < high:
            async_copy.async_copy_global_to_shared(tiles.index(slot), p_tile, mask=(o_n < high - i_n) & (o_d < D))
    elif i_n + BLOCK_N <= high:
        async_copy.async_copy_global_to_shared(tiles.index(slot), p_tile)
    elif i_n < high:
        async_copy.async_copy_global_to_shared(tiles.index(slot), p_tile, mask=o_n < high - i_n)
    async_copy.commit_group()


@gluon.jit
def start_ring(ring, first, step, high, STRIDE_K: gl.constexpr, STRIDE_V: gl.constexpr, D: gl.constexpr):
    """Starts the copies of all tiles but one that the ring holds, from slot `first` on, each `step` after the last."""
    keys, values, p_key, p_value, o_n, o_d = ring
    for i in gl.static_range(keys.shape[0] - 1):
        _copy_tile(keys, i, p_key, o_n, o_d, first + i * step, high, STRIDE_K, D)
        _copy_tile(values, i, p_value, o_n, o_d, first + i * step, high, STRIDE_V, D)


@gluon.jit
def restart_ring(
    ring, first, high, true_first, true_high, step,
    STRIDE_K: gl.constexpr, STRIDE_V: gl.constexpr, D: gl.constexpr,
):  # fmt: skip
    """Starts again what began from a hint, if the kernel ahead has changed the range since."""
    if (first != true_first) | (high != true_high):
        async_copy.wait_group(0)
        start_ring(ring, true_first, step, true_high, STRIDE_K, STRIDE_V, D)


@gluon.jit
def attend(
    queries, ring, first, step, high, first_column, G, window, to_log2,
    STRIDE_K: gl.constexpr, STRIDE_V: gl.constexpr, D: gl.constexpr, IS_CAUSAL: gl.constexpr, HAS_WINDOW: gl.constexpr,
):  # fmt: skip
    """Each warp's (output, max, sum) of a ring that `start_ring` has started: [W, BLOCK_M, BLOCK_D] and [W, BLOCK_M].

    Row r is at column first_column + r // G, as far as it has a mask of its own.
    """
    keys, values, p_key, p_value, o_n, o_d = ring
    NUM_SLOTS: gl.constexpr = keys.shape[0]
    W: gl.constexpr = keys.shape[1]
    NW: gl.constexpr = keys.shape[2]
    BLOCK_M: gl.constexpr = queries.shape[1]
    BLOCK_D: gl.constexpr = queries.shape[2]
    mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [W, 1, 1], [1, 16, 8])
    left: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    right: gl.constexpr = gl.DotOperandLayout(1, mma, 2)
    PENDING: gl.constexpr = 2 * (NUM_SLOTS - 1) - 1
    b_o = gl.zeros([W, BLOCK_M, BLOCK_D], gl.float32, mma)
    b_max = gl.full([W, BLOCK_M], float("-inf"), gl.float32, gl.SliceLayout(2, mma))
    b_sum = gl.zeros([W, BLOCK_M], gl.float32, gl.SliceLayout(2, mma))
    b_zero = gl.zeros([W, BLOCK_M, NW], gl.float32, mma)
    b_every_warp = gl.zeros([W, 1, 1], keys.dtype, left)
    o_score = offsets(0, W, mma) * NW + offsets(2, NW, mma)
    o_column = first_column + offsets(1, BLOCK_M, mma) // G
    full = 0
    free = NUM_SLOTS - 1
    for i_n in range(first, high, step):
        i_ahead = i_n + (NUM_SLOTS - 1) * step
        async_copy.wait_group(PENDING)
        b_q = queries.load(left) + b_every_warp
        b_s = mma_v2(b_q, keys.index(full).permute((0, 2, 1)).load(right), b_zero)
        m_s = o_score < high - i_n
        if IS_CAUSAL:
            m_s = m_s & (i_n + o_score <= o_column)
        if HAS_WINDOW:
            m_s = m_s & (i_n + o_score > o_column - window)
        b_s = gl.where(m_s, b_s, float("-inf"))
        _copy_tile(keys, free, p_key, o_n, o_d, i_ahead, high, STRIDE_K, D)
        b_new_max = gl.maximum(b_max, gl.max(b_s, 2))
        b_ref = softmax.finite(b_new_max)
        b_p = gl.exp2((b_s - b_ref[:, :, None]) * to_log2)
        b_decay = gl.exp2((b_max - b_ref) * to_log2)
        b_sum = b_sum * b_decay + gl.sum(b_p, 2)
        b_max = b_new_max
        b_o *= b_decay[:, :, None]
        async_copy.wait_group(PENDING)
        b_o = mma_v2(gl.convert_layout(b_p.to(keys.dtype), left), values.index(full).load(right), b_o)
        _copy_tile(values, free, p_value, o_n, o_d, i_ahead, high, STRIDE_V, D)
        free = full
        full = gl.where(full == NUM_SLOTS - 1, 0, full + 1)
    async_copy.wait_group(0)
    return b_o, b_max, b_sum


@gluon.jit
def add_warps(b_o, b_max, b_sum, to_log2, HELD_ROWS: gl.constexpr):
    """The warps' (output, max, sum) in one: [1, HELD_ROWS, BLOCK_D] and [1, HELD_ROWS], in `output_layout`."""
    W: gl.constexpr = b_o.shape[0]
    BLOCK_M: gl.constexpr = b_o.shape[1]
    BLOCK_D: gl.constexpr = b_o.shape[2]
    layout: gl.constexpr = output_layout(BLOCK_D, W)
    row_layout: gl.constexpr = gl.SliceLayout(2, layout)
    # A thread holds row r and row r + 8: half of them are not worth storing.
    if BLOCK_M == 16 and HELD_ROWS <= 8:
        b_o, _ = gl.split(b_o.reshape([W, 2, 8, BLOCK_D]).permute((0, 2, 3, 1)))
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    swizzled: gl.constexpr = gl.SwizzledSharedLayout(8, 1, min(8, HELD_ROWS), [2, 1, 0])
    maxima = gl.allocate_shared_memory(gl.float32, b_max.shape, plain, b_max)
    sums = gl.allocate_shared_memory(gl.float32, b_sum.shape, plain, b_sum)
    outputs = gl.allocate_shared_memory(gl.float32, b_o.shape, swizzled, b_o)
    b_top = gl.full([1, HELD_ROWS], float("-inf"), gl.float32, row_layout)
    for i in gl.static_range(W):
        b_top = gl.maximum(b_top, maxima.slice(i, 1).slice(0, HELD_ROWS, dim=1).load(row_layout))
    b_ref = softmax.finite(b_top)
    b_total = gl.zeros([1, HELD_ROWS], gl.float32, row_layout)
    b_all = gl.zeros([1, HELD_ROWS, BLOCK_D], gl.float32, layout)
    for i in gl.static_range(W):
        b_share = gl.exp2((maxima.slice(i, 1).slice(0, HELD_ROWS, dim=1).load(row_layout) - b_ref) * to_log2)
        b_total += sums.slice(i, 1).slice(0, HELD_ROWS, dim=1).load(row_layout) * b_share
        b_all += outputs.slice(i, 1).slice(0, HELD_ROWS, dim=1).load(layout) * b_share[:, :, None]
    return b_all, b_top, b_total


@gluon.jit
def store_partial(p_partial, num_splits, num_rows, i_part, b_o, b_max, b_sum, m_row, D: gl.constexpr):
    """As `combine.store_partial`, of rows i_part [1, HELD_ROWS]."""
    p_partial_max, p_partial_sum = combine.maxima_and_sums(p_partial, num_splits, num_rows, D)
    BLOCK_D: gl.constexpr = b_o.shape[2]
    layout: gl.constexpr = b_o.type.layout
    o_d = offsets(2, BLOCK_D, layout)
    gl.store(p_partial + i_part[:, :, None] * D + o_d, b_o, mask=m_row[:, :, None] & (o_d < D))
    gl.store(p_partial_max + i_part, b_max, mask=m_row)
    gl.store(p_partial_sum + i_part, b_sum, mask=m_row)


@gluon.jit
def finish(b_o, b_max, b_sum, p_sinks, o_head, m_row, to_natural):
    """The normalised output [1, HELD_ROWS, BLOCK_D], and the natural log of the denominator, sinks included."""
    b_sink = gl.full(b_max.shape, float("-inf"), gl.float32, b_max.type.layout)
    if p_sinks is not None:
        b_sink = gl.load(p_sinks + o_head, mask=m_row, other=0.0).to(gl.float32)
    b_scale, b_lse = softmax.output_scale(b_max, b_sum, b_sink, to_natural)
    return b_o * b_scale[:, :, None], b_lse
