"""Prefill on Hopper, in Gluon: tiled attention with specialised warps (FlashAttention-3, arXiv 2407.08608).

One group of four warps works out what the row tiles are, and brings them in by the copy engine. Two more have half of
a tile's query rows each: while the tensor cores multiply one tile of values, the next tile's scores become weights.
Programs stay, and take row tile after row tile in the order of tile_order.py.
"""

from __future__ import annotations

import torch
import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from csrc_free_kernels import row_tile, softmax, tile_order
from csrc_free_kernels.launch import Launcher
from csrc_free_kernels.tuning import HopperTiles, ceil_div, padded_head_dim

# Registers of a thread in the two groups that multiply and in the one that copies: together 504, all that there are.
_CONSUMER_REGISTERS = gl.constexpr(232)
_PRODUCER_REGISTERS = gl.constexpr(40)


@gluon.jit
def _clear_rows(tile, num_seen):
    """Zeros in the rows of a value tile from num_seen on: an unseen slot may hold NaN, and 0 * NaN is NaN."""
    BLOCK_N: gl.constexpr = tile.shape[0]
    LANES: gl.constexpr = tile.shape[1] // 8
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 // LANES, LANES], [gl.num_warps(), 1], [1, 0])
    # As many as a thread has registers for.
    ROWS: gl.constexpr = 512 // LANES
    o_n = gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))[:, None]
    for i_n in gl.static_range(0, BLOCK_N, ROWS):
        rows = tile.slice(i_n, ROWS, dim=0)
        b_v = rows.load(layout)
        rows.store(gl.where(i_n + o_n < num_seen, b_v, gl.zeros_like(b_v)))


@gluon.jit
def _produce(
    d_query, d_key, d_value, rings, v_landed, num_tiles, sizes, p_range, stride_range, num_before,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, IS_CAUSAL: gl.constexpr, HAS_WINDOW: gl.constexpr,
):  # fmt: skip
    """Fills the rings: what each row tile is and its queries, then its keys and values from the last tile on."""
    facts, queries, keys, values, q_full, q_empty, k_full, k_empty, v_full, v_empty = rings
    G = sizes[3]
    NUM_QUERY_SLOTS: gl.constexpr = queries.shape[0] // 2
    NUM_SLOTS: gl.constexpr = keys.shape[0]
    BLOCK_D: gl.constexpr = keys.shape[4]
    i_kv = 0
    num_cleared = 0
    for i_turn in range(tile_order.num_turns(gl.program_id(0), gl.num_programs(0), num_tiles)):
        i_b, i_h, i_m, first_column, low, high, num_kv_tiles, end = row_tile.find(
            i_turn, sizes, p_range, stride_range, num_before, BLOCK_M, BLOCK_N, IS_CAUSAL, HAS_WINDOW
        )
        q_slot = i_turn % NUM_QUERY_SLOTS
        for i_half in gl.static_range(2):
            mbarrier.wait(q_empty.index(q_slot * 2 + i_half), (i_turn // NUM_QUERY_SLOTS & 1) ^ 1)
        row_tile.tell(facts.index(q_slot), (i_b, i_h, i_m, first_column, low, high, num_kv_tiles))
        # All warps have stored before one of them says so.
        gl.thread_barrier()
        for i_half in gl.static_range(2):
            slot = q_slot * 2 + i_half
            mbarrier.expect(q_full.index(slot), d_query.block_type.nbytes)
            o_row = i_m * BLOCK_M + i_half * (BLOCK_M // 2)
            tma.async_copy_global_to_shared(d_query, [i_b, i_h, o_row, 0], q_full.index(slot), queries.index(slot))
        for i in range(num_kv_tiles):
            i_n = low + (num_kv_tiles - 1 - i) * BLOCK_N
            slot = i_kv % NUM_SLOTS
            phase = i_kv // NUM_SLOTS & 1
            mbarrier.wait(k_empty.index(slot), phase ^ 1)
            mbarrier.expect(k_full.index(slot), d_key.block_type.nbytes)
            corner = [i_b, i_h // G, i_n, 0]
            tma.async_copy_global_to_shared(d_key, corner, k_full.index(slot), keys.index(slot))
            mbarrier.wait(v_empty.index(slot), phase ^ 1)
            if p_range is None or i_n + BLOCK_N <= end:
                mbarrier.expect(v_full.index(slot), d_value.block_type.nbytes)
                tma.async_copy_global_to_shared(d_value, corner, v_full.index(slot), values.index(slot))
            else:
                mbarrier.expect(v_landed, d_value.block_type.nbytes)
                tma.async_copy_global_to_shared(d_value, corner, v_landed, values.index(slot))
                mbarrier.wait(v_landed, num_cleared & 1)
                num_cleared += 1
                _clear_rows(values.index(slot).reshape([BLOCK_N, BLOCK_D]), end - i_n)
                hopper.fence_async_shared()
                mbarrier.arrive(v_full.index(slot), count=1)
            i_kv += 1


@gluon.jit
def _start_scores(query, keys, slot, b_zero):
    """Starts the product of the queries with a slot's keys."""
    key = keys.index(slot).reshape([keys.shape[3], keys.shape[4]]).permute((1, 0))
    return hopper.warpgroup_mma(query, key, b_zero, use_acc=False, is_async=True)


@gluon.jit
def _start_output(b_w, values, slot, b_o):
    """Starts adding the product of weights with a slot's values."""
    value = values.index(slot).reshape([values.shape[3], values.shape[4]])
    return hopper.warpgroup_mma(b_w, value, b_o, is_async=True)


@gluon.jit
def _mask(b_s, i_n, first_column, high, num_before, IS_CAUSAL: gl.constexpr, HAS_WINDOW: gl.constexpr):
    """Scores of the slots from i_n on, -inf where the rows from first_column on may not see them."""
    layout: gl.constexpr = b_s.type.layout
    o_slot = i_n + gl.arange(0, b_s.shape[1], layout=gl.SliceLayout(0, layout))[None, :]
    o_column = first_column + gl.arange(0, b_s.shape[0], layout=gl.SliceLayout(1, layout))[:, None]
    m_s = o_slot < high
    if IS_CAUSAL:
        m_s = m_s & (o_slot <= o_column)
    if HAS_WINDOW:
        m_s = m_s & (o_slot >= o_column - num_before)
    return gl.where(m_s, b_s, float("-inf"))


@gluon.jit
def _update(b_s, b_max, b_sum, to_log2):
    """Takes scores into the running (max, sum); returns the weights and what earlier sums decay by as well."""
    b_new_max = gl.maximum(b_max, gl.max(b_s, 1))
    # A row that has seen nothing keeps -inf, and -inf - -inf is NaN.
    b_ref = gl.where(b_new_max == float("-inf"), 0.0, b_new_max) * to_log2
    b_p = gl.exp2(b_s * to_log2 - b_ref[:, None])
    b_decay = gl.exp2(b_max * to_log2 - b_ref)
    return b_p, b_decay, b_new_max, b_sum * b_decay + gl.sum(b_p, 1)


@gluon.jit
def _release(q_empty, slot):
    """Gives a slot of queries back, once the output has left it."""
    tma.store_wait(0)
    mbarrier.arrive(q_empty.index(slot), count=1)


@gluon.jit
def _consume(
    d_output, p_lse, p_sinks, rings, num_tiles, Hq, Q, num_before, to_log2, to_natural,
    I_HALF: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    IS_CAUSAL: gl.constexpr, HAS_WINDOW: gl.constexpr,
):  # fmt: skip
    """Attention of one half of each row tile."""
    facts, queries, keys, values, q_full, q_empty, k_full, k_empty, v_full, v_empty = rings
    NUM_QUERY_SLOTS: gl.constexpr = queries.shape[0] // 2
    NUM_SLOTS: gl.constexpr = keys.shape[0]
    BLOCK_D: gl.constexpr = keys.shape[4]
    ROWS: gl.constexpr = BLOCK_M // 2
    dtype: gl.constexpr = keys.dtype
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    output_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    weight_layout: gl.constexpr = gl.DotOperandLayout(0, output_layout, 2)
    row_layout: gl.constexpr = gl.SliceLayout(1, score_layout)
    output_row_layout: gl.constexpr = gl.SliceLayout(1, output_layout)
    b_zero = gl.zeros([ROWS, BLOCK_N], gl.float32, score_layout)
    i_kv = 0
    for i_turn in range(tile_order.num_turns(gl.program_id(0), gl.num_programs(0), num_tiles)):
        b_o = gl.zeros([ROWS, BLOCK_D], gl.float32, output_layout)
        b_max = gl.full([ROWS], float("-inf"), gl.float32, row_layout)
        b_sum = gl.zeros([ROWS], gl.float32, row_layout)

        q_slot = i_turn % NUM_QUERY_SLOTS * 2 + I_HALF
        query = queries.index(q_slot).reshape([ROWS, BLOCK_D])
        mbarrier.wait(q_full.index(q_slot), i_turn // NUM_QUERY_SLOTS & 1)
        slot = i_kv % NUM_SLOTS
        mbarrier.wait(k_full.index(slot), i_kv // NUM_SLOTS & 1)
        b_s = _start_scores(query, keys, slot, b_zero)
        own = facts.index(i_turn % NUM_QUERY_SLOTS)
        first_column = row_tile.told(own, row_tile.FIRST_COLUMN) + I_HALF * ROWS
        low = row_tile.told(own, row_tile.LOW)
        high = row_tile.told(own, row_tile.HIGH)
        num_kv_tiles = row_tile.told(own, row_tile.NUM_KV_TILES)
        # Every row sees the slots below this, and with a window those from the last row's first on.
        full_high = high
        if IS_CAUSAL:
            full_high = gl.minimum(high, first_column + 1)
        b_s = hopper.warpgroup_mma_wait(0, deps=[b_s])
        mbarrier.arrive(k_empty.index(slot), count=1)
        if NUM_QUERY_SLOTS > 1 and i_turn > 0:
            _release(q_empty, (i_turn - 1) % NUM_QUERY_SLOTS * 2 + I_HALF)
        i_n = low + (num_kv_tiles - 1) * BLOCK_N
        b_s = _mask(b_s, i_n, first_column, high, num_before, IS_CAUSAL, HAS_WINDOW)
        b_p, b_decay, b_max, b_sum = _update(b_s, b_max, b_sum, to_log2)
        b_w = gl.convert_layout(b_p.to(dtype), weight_layout)
        for i in range(1, num_kv_tiles):
            i_n = low + (num_kv_tiles - 1 - i) * BLOCK_N
            slot = i_kv % NUM_SLOTS
            phase = i_kv // NUM_SLOTS & 1
            i_kv += 1
            next_slot = i_kv % NUM_SLOTS
            mbarrier.wait(k_full.index(next_slot), i_kv // NUM_SLOTS & 1)
            b_s = _start_scores(query, keys, next_slot, b_zero)
            mbarrier.wait(v_full.index(slot), phase)
            b_o = _start_output(b_w, values, slot, b_o)
            b_s = hopper.warpgroup_mma_wait(1, deps=[b_s])
            mbarrier.arrive(k_empty.index(next_slot), count=1)
            is_edge = i_n + BLOCK_N > full_high
            if HAS_WINDOW:
                is_edge = is_edge | (i_n + num_before < first_column + ROWS - 1)
            if is_edge:
                b_s = _mask(b_s, i_n, first_column, high, num_before, IS_CAUSAL, HAS_WINDOW)
            b_p, b_decay, b_max, b_sum = _update(b_s, b_max, b_sum, to_log2)
            b_next = gl.convert_layout(b_p.to(dtype), weight_layout)
            # With the weights named as well, less of what makes them is put off until after the wait.
            b_o, b_w = hopper.warpgroup_mma_wait(0, deps=[b_o, b_next])
            mbarrier.arrive(v_empty.index(slot), count=1)
            b_o = b_o * gl.convert_layout(b_decay, output_row_layout)[:, None]
        slot = i_kv % NUM_SLOTS
        mbarrier.wait(v_full.index(slot), i_kv // NUM_SLOTS & 1)
        b_o = _start_output(b_w, values, slot, b_o)
        i_kv += 1
        i_b = row_tile.told(own, row_tile.BATCH)
        i_h = row_tile.told(own, row_tile.HEAD)
        first_row = row_tile.told(own, row_tile.TILE) * BLOCK_M + I_HALF * ROWS
        b_o = hopper.warpgroup_mma_wait(0, deps=[b_o])
        mbarrier.arrive(v_empty.index(slot), count=1)

        b_max = b_max * to_natural
        b_sink = gl.full([ROWS], float("-inf"), gl.float32, row_layout)
        if p_sinks is not None:
            b_sink = gl.full([ROWS], gl.load(p_sinks + i_h).to(gl.float32), gl.float32, row_layout)
        b_all_max = gl.maximum(b_max, b_sink)
        b_ref = gl.where(b_all_max == float("-inf"), 0.0, b_all_max)
        b_decay = gl.exp(b_max - b_ref)
        b_total = b_sum * b_decay + gl.exp(b_sink - b_ref)
        b_scale = b_decay / gl.where(b_total == 0.0, 1.0, b_total)
        b_o = b_o * gl.convert_layout(b_scale, output_row_layout)[:, None]
        # Through the place of the queries, which have served.
        query.store(b_o.to(dtype))
        hopper.fence_async_shared()
        tma.async_copy_shared_to_global(d_output, [i_b, i_h, first_row, 0], queries.index(q_slot))
        if p_lse is not None:
            o_row = first_row + gl.arange(0, ROWS, layout=row_layout)
            p_row = p_lse + (i_b * Hq + i_h).to(gl.int64) * Q + o_row
            gl.store(p_row, b_ref + gl.log(b_total), mask=o_row < Q)
        # Not waited for where the next tile's queries have a place of their own.
        if NUM_QUERY_SLOTS == 1:
            _release(q_empty, q_slot)
    # Shared memory may go to another program only once it has been read.
    tma.store_wait(0)


@gluon.jit
def _barriers(NUM: gl.constexpr, COUNT: gl.constexpr):
    """Barriers that complete at COUNT arrivals."""
    barriers = gl.allocate_shared_memory(gl.int64, [NUM, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(NUM):
        mbarrier.init(barriers.index(i), count=COUNT)
    return barriers


@Launcher
@gluon.jit(do_not_specialize=["num_tiles", "num_sections", "section_heads", "Hq", "G", "Q", "S", "num_before"])
def _prefill_kernel(
    d_query, d_key, d_value, d_output, p_lse, p_sinks, p_range, stride_range,
    num_tiles, num_sections, section_heads, Hq, G, Q, S, to_log2, to_natural, num_before,
    BLOCK_M: gl.constexpr, NUM_QUERY_SLOTS: gl.constexpr, NUM_SLOTS: gl.constexpr,
    IS_CAUSAL: gl.constexpr, HAS_WINDOW: gl.constexpr,
):  # fmt: skip
    BLOCK_N: gl.constexpr = d_key.block_shape[2]
    BLOCK_D: gl.constexpr = d_key.block_shape[3]
    dtype: gl.constexpr = d_key.dtype
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    facts = gl.allocate_shared_memory(gl.int32, [NUM_QUERY_SLOTS, 8], plain)
    queries = gl.allocate_shared_memory(dtype, [2 * NUM_QUERY_SLOTS, 1, 1, BLOCK_M // 2, BLOCK_D], d_query.layout)
    keys = gl.allocate_shared_memory(dtype, [NUM_SLOTS, 1, 1, BLOCK_N, BLOCK_D], d_key.layout)
    values = gl.allocate_shared_memory(dtype, [NUM_SLOTS, 1, 1, BLOCK_N, BLOCK_D], d_value.layout)
    q_full = _barriers(2 * NUM_QUERY_SLOTS, 1)
    q_empty = _barriers(2 * NUM_QUERY_SLOTS, 1)
    k_full = _barriers(NUM_SLOTS, 1)
    k_empty = _barriers(NUM_SLOTS, 2)
    v_full = _barriers(NUM_SLOTS, 1)
    v_empty = _barriers(NUM_SLOTS, 2)
    v_landed = _barriers(1, 1)
    hopper.fence_async_shared()
    rings = (facts, queries, keys, values, q_full, q_empty, k_full, k_empty, v_full, v_empty)
    sizes = (num_sections, section_heads, Hq, G, Q, S)
    # fmt: off
    gl.warp_specialize(
        [
            (_consume, (d_output, p_lse, p_sinks, rings, num_tiles, Hq, Q, num_before, to_log2, to_natural,
                        0, BLOCK_M, BLOCK_N, IS_CAUSAL, HAS_WINDOW)),
            (_consume, (d_output, p_lse, p_sinks, rings, num_tiles, Hq, Q, num_before, to_log2, to_natural,
                        1, BLOCK_M, BLOCK_N, IS_CAUSAL, HAS_WINDOW)),
            (_produce, (d_query, d_key, d_value, rings, v_landed.index(0), num_tiles, sizes, p_range, stride_range,
                        num_before, BLOCK_M, BLOCK_N, IS_CAUSAL, HAS_WINDOW)),
        ],
        [4, 4],
        [_CONSUMER_REGISTERS, _PRODUCER_REGISTERS],
    )
    # fmt: on


def prefill_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor | None,
    *,
    kv_range: torch.Tensor | None,
    sinks: torch.Tensor | None,
    scale: float,
    is_causal: bool,
    window: int,
    tiles: HopperTiles,
    section_heads: int,
) -> None:
    """As `prefill.prefill_attention`, for what `prefill.is_served_by_hopper` accepts."""
    batch, num_query_heads, query_len, head_dim = query.shape
    num_heads = batch * num_query_heads
    num_tiles = ceil_div(query_len, tiles.block_m) * num_heads
    scores = softmax.score_scale(scale, softcap=0.0)
    half_block_m, block_d = tiles.block_m // 2, padded_head_dim(head_dim)
    _prefill_kernel(
        (min(num_tiles, tiles.num_programs),),
        _descriptor(query, half_block_m, block_d),
        _descriptor(key, tiles.block_n, block_d),
        _descriptor(value, tiles.block_n, block_d),
        _descriptor(output, half_block_m, block_d),
        lse,
        sinks,
        kv_range,
        None if kv_range is None else kv_range.stride(),
        num_tiles,
        num_heads // section_heads,
        section_heads,
        num_query_heads,
        num_query_heads // key.shape[1],
        query_len,
        key.shape[2],
        scores.to_log2,
        scores.to_natural,
        window - 1,
        BLOCK_M=tiles.block_m,
        NUM_QUERY_SLOTS=tiles.num_query_slots,
        NUM_SLOTS=tiles.num_slots,
        IS_CAUSAL=is_causal,
        HAS_WINDOW=window > 0,
        num_warps=4,
    )


def _descriptor(tensor: torch.Tensor, rows: int, block_d: int) -> TensorDescriptor:
    """For copies of `rows` tokens of a head; what lies outside the tensor reads as zero, and is not written."""
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), [1, 1, rows, block_d], layout)
