"""Decode's fused form on Hopper, in Gluon. What it computes, and how it is split over programs, is rope_decode.py's."""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from csrc_free_kernels import combine, dependent_launch, masks, rope_decode, softmax, split_hopper
from csrc_free_kernels.decode_tuning import RingTiles
from csrc_free_kernels.launch import Launcher
from csrc_free_kernels.layouts import offsets
from csrc_free_kernels.tuning import padded_head_dim


@gluon.jit
def _load_rotated(p_rows, m_row, o_d, p_cos, p_sin, D: gl.constexpr):
    """As `rope_decode._load_rotated`, of rows at p_rows [1, N, 1]. [1, N, BLOCK_D]."""
    HALF: gl.constexpr = D // 2
    o_partner = (o_d + HALF) % D
    m_d = o_d < D
    b_x = gl.load(p_rows + o_d, mask=m_row & m_d, other=0.0).to(gl.float32)
    b_partner = gl.load(p_rows + o_partner, mask=m_row & m_d, other=0.0).to(gl.float32)
    b_cos = gl.load(p_cos + o_d, mask=m_d, other=0.0).to(gl.float32)
    b_sin = gl.load(p_sin + o_d, mask=m_d, other=0.0).to(gl.float32)
    b_sin = gl.where(o_d < HALF, -b_sin, b_sin)
    return (b_x * b_cos + b_partner * b_sin).to(p_rows.dtype.element_ty)


@gluon.jit
def _prefetch_next(p_next, num_lines):
    """As `rope_decode._prefetch_next`."""
    BLOCK: gl.constexpr = 256
    ELEMENTS: gl.constexpr = dependent_launch.LINE_BYTES // (p_next.dtype.element_ty.primitive_bitwidth // 8)
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    share = gl.cdiv(num_lines, gl.num_programs(0))
    first = gl.program_id(0) * share
    last = gl.minimum(first + share, num_lines) - 1
    for i_line in range(first, last + 1, BLOCK):
        o_line = gl.minimum(i_line + gl.arange(0, BLOCK, layout=layout), last)
        dependent_launch.prefetch_l2(p_next + o_line.to(gl.int64) * ELEMENTS)


@Launcher
@gluon.jit(do_not_specialize=["Hkv", "G", "S", "window", "num_splits", "num_rows", "num_next_lines"])
def _rope_decode_kernel(
    p_query, p_key, p_value, p_cos, p_sin, p_key_cache, p_value_cache, p_output, p_partial, p_range, p_sinks, p_next,
    stride_query, stride_key, stride_value, stride_cos, stride_sin, stride_key_cache, stride_value_cache,
    stride_output, stride_range,
    Hkv, G, S, to_log2, to_natural, window, num_splits, num_rows, num_next_lines,
    STRIDE_K: gl.constexpr, STRIDE_V: gl.constexpr, D: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_M: gl.constexpr,
    HELD_ROWS: gl.constexpr, BLOCK_N: gl.constexpr, NUM_SLOTS: gl.constexpr, PREFETCHED_SLOTS: gl.constexpr,
    HAS_WINDOW: gl.constexpr, IS_SPLIT: gl.constexpr,
):  # fmt: skip
    i_split = gl.program_id(0) % num_splits
    i_b = (gl.program_id(0) // num_splits // Hkv).to(gl.int64)
    i_kv_head = gl.program_id(0) // num_splits % Hkv
    p_k = p_key_cache + i_b * stride_key_cache[0] + i_kv_head.to(gl.int64) * stride_key_cache[1]
    p_v = p_value_cache + i_b * stride_value_cache[0] + i_kv_head.to(gl.int64) * stride_value_cache[1]
    ring = split_hopper.make_ring(p_k, p_v, BLOCK_N, BLOCK_D, NUM_SLOTS)
    queries = split_hopper.make_queries(p_query.dtype.element_ty, BLOCK_M, HELD_ROWS, BLOCK_D)

    # Row r of the tile is head r of the group.
    layout: gl.constexpr = split_hopper.output_layout(BLOCK_D, gl.num_warps())
    o_d = offsets(2, BLOCK_D, layout)
    o_row = offsets(1, HELD_ROWS, layout)
    m_d = o_d < D
    m_row = o_row < G
    o_head = i_kv_head * G + o_row
    p_q = p_query + i_b * stride_query[0] + o_head.to(gl.int64) * stride_query[1]
    o_one = offsets(1, 1, layout).to(gl.int64)
    p_new_k = p_key + i_b * stride_key[0] + i_kv_head.to(gl.int64) * stride_key[1] + o_one
    p_new_v = p_value + i_b * stride_value[0] + i_kv_head.to(gl.int64) * stride_value[1] + o_one
    p_c = p_cos + i_b * stride_cos
    p_s = p_sin + i_b * stride_sin

    step = num_splits * BLOCK_N
    start, end = split_hopper.load_range_hint(p_range, stride_range, i_b, S)
    low, _ = masks.visible_bounds(start, end, end - 1, end - 1, window, False, HAS_WINDOW)
    high = gl.maximum(low, end - 1)
    first = low + i_split * BLOCK_N
    split_hopper.prefetch(ring, first, step, S, STRIDE_K, STRIDE_V, D, PREFETCHED_SLOTS)
    gdc_wait()
    split_hopper.start_ring(ring, first, step, high, STRIDE_K, STRIDE_V, D)
    start, end, has_slot = rope_decode.load_slot_range(p_range, stride_range, i_b, S)
    # The cached slots [low, high) that the new token sees.
    true_low, _ = masks.visible_bounds(start, end, end - 1, end - 1, window, False, HAS_WINDOW)
    true_high = gl.maximum(true_low, end - 1)
    true_first = true_low + i_split * BLOCK_N
    split_hopper.restart_ring(ring, first, high, true_first, true_high, step, STRIDE_K, STRIDE_V, D)
    first = true_first
    high = true_high

    b_q = _load_rotated(p_q, m_row, o_d, p_c, p_s, D)
    queries.slice(0, HELD_ROWS, dim=1).store(b_q)
    is_first = i_split == 0
    b_new_k = _load_rotated(p_new_k, is_first, o_d, p_c, p_s, D)
    b_new_v = gl.load(p_new_v + o_d, mask=m_d & is_first, other=0.0)
    i_slot = (end - 1).to(gl.int64)
    m_new = m_d & is_first & has_slot
    gl.store(p_k + i_slot * STRIDE_K + o_d + o_one, b_new_k, mask=m_new)
    gl.store(p_v + i_slot * STRIDE_V + o_d + o_one, b_new_v, mask=m_new)
    b_new_s = gl.sum(b_q.to(gl.float32) * b_new_k.to(gl.float32), 2)

    b_o, b_max, b_sum = split_hopper.attend(
        queries, ring, first, step, high, 0, G, window, to_log2, STRIDE_K, STRIDE_V, D, False, False
    )
    # Only now: weights must not stand in the way of the cache's slots, neither these nor what the next kernel asks for.
    if p_next is not None:
        _prefetch_next(p_next, num_next_lines)
    gdc_launch_dependents()
    b_o, b_max, b_sum = split_hopper.add_warps(b_o, b_max, b_sum, to_log2, HELD_ROWS)

    # Split 0 takes in the new token. Where it is not seen, its value may be NaN, and 0 * NaN is NaN.
    sees_new = is_first & (start < end)
    b_seen_v = gl.where(sees_new, b_new_v.to(gl.float32), 0.0)
    b_new_s = gl.where(sees_new, b_new_s, float("-inf"))
    b_top = gl.maximum(b_max, b_new_s)
    b_ref = softmax.finite(b_top)
    b_decay = gl.exp2((b_max - b_ref) * to_log2)
    b_new_p = gl.exp2((b_new_s - b_ref) * to_log2)
    # Without a slot: a NaN denominator makes NaN of the output, through the combination too.
    b_sum = b_sum * b_decay + gl.where(has_slot, b_new_p, float("nan"))
    b_o = b_o * b_decay[:, :, None] + b_new_p[:, :, None] * b_seen_v

    o_row = gl.arange(0, HELD_ROWS, layout=gl.SliceLayout(0, gl.SliceLayout(2, layout)))[None, :]
    m_row = o_row < G
    o_head = i_kv_head * G + o_row
    if IS_SPLIT:
        i_part = i_split.to(gl.int64) * num_rows + i_b * Hkv * G + o_head
        split_hopper.store_partial(p_partial, num_splits, num_rows, i_part, b_o, b_top, b_sum, m_row, D)
    else:
        b_o, _ = split_hopper.finish(b_o, b_top, b_sum, p_sinks, o_head, m_row, to_natural)
        p_o = p_output + i_b * stride_output[0] + (o_head.to(gl.int64) * stride_output[1])[:, :, None] + o_d
        gl.store(p_o, b_o.to(p_output.dtype.element_ty), mask=m_row[:, :, None] & m_d)


def rope_append_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    output: torch.Tensor,
    *,
    kv_range: torch.Tensor,
    sinks: torch.Tensor | None,
    scale: float,
    window: int,
    next_weight: torch.Tensor | None,
    num_next_lines: int,
    num_splits: int,
    prefetched_slots: int,
    tiles: RingTiles,
) -> None:
    """As `rope_decode.rope_append_attention`, for what `shares.is_served_by_ring` accepts."""
    batch, num_query_heads, _, head_dim = query.shape
    num_kv_heads = key_cache.shape[1]
    scores = softmax.score_scale(scale, softcap=0.0)
    partials = combine.allocate_partials(output, num_splits) if num_splits > 1 else None
    _rope_decode_kernel(
        (batch * num_kv_heads * num_splits,),
        query,
        key,
        value,
        cos,
        sin,
        key_cache,
        value_cache,
        output,
        partials,
        kv_range,
        sinks,
        next_weight,
        query.stride()[:2],
        key.stride()[:2],
        value.stride()[:2],
        # A batch of one serves every row.
        cos.stride(0) if cos.shape[0] > 1 else 0,
        sin.stride(0) if sin.shape[0] > 1 else 0,
        key_cache.stride()[:2],
        value_cache.stride()[:2],
        output.stride()[:2],
        kv_range.stride(),
        num_kv_heads,
        num_query_heads // num_kv_heads,
        key_cache.shape[2],
        scores.to_log2,
        scores.to_natural,
        window,
        num_splits,
        batch * num_query_heads,
        num_next_lines,
        STRIDE_K=key_cache.stride(2),
        STRIDE_V=value_cache.stride(2),
        D=head_dim,
        BLOCK_D=padded_head_dim(head_dim),
        BLOCK_M=tiles.block_m,
        HELD_ROWS=tiles.held_rows,
        BLOCK_N=tiles.block_n,
        NUM_SLOTS=tiles.num_slots,
        PREFETCHED_SLOTS=prefetched_slots,
        HAS_WINDOW=window > 0,
        IS_SPLIT=partials is not None,
        num_warps=tiles.num_warps,
        maxnreg=split_hopper.MAX_REGISTERS,
        launch_pdl=True,
    )
    if partials is not None:
        combine.combine_splits(
            partials, output, None, num_splits=num_splits, sinks=sinks, scores=scores, is_dependent=True
        )
