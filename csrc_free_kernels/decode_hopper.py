"""Decode on Hopper, in Gluon. What it computes, and how it is split over programs, is decode.py's.

A short call lasts as long as its instructions from the end of the kernel ahead to its own last store: so the addresses
are made before, and the first tiles asked for by the range as it was then, and again only if it has changed.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from csrc_free_kernels import combine, masks, softmax, split_hopper
from csrc_free_kernels.decode_tuning import RingTiles
from csrc_free_kernels.launch import Launcher
from csrc_free_kernels.layouts import offsets
from csrc_free_kernels.tuning import padded_head_dim


@Launcher
@gluon.jit(do_not_specialize=["Hkv", "G", "Q", "S", "window", "num_splits", "num_rows"])
def _decode_kernel(
    p_query, p_key, p_value, p_output, p_lse, p_partial, p_range, p_sinks,
    stride_query, stride_key, stride_value, stride_output, stride_range,
    Hkv, G, Q, S, to_log2, to_natural, window, num_splits, num_rows,
    STRIDE_K: gl.constexpr, STRIDE_V: gl.constexpr, D: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_M: gl.constexpr,
    HELD_ROWS: gl.constexpr, BLOCK_N: gl.constexpr, NUM_SLOTS: gl.constexpr, PREFETCHED_SLOTS: gl.constexpr,
    IS_CAUSAL: gl.constexpr, HAS_WINDOW: gl.constexpr, IS_SINGLE_TOKEN: gl.constexpr, IS_SPLIT: gl.constexpr,
):  # fmt: skip
    i_split = gl.program_id(0) % num_splits
    i_b = (gl.program_id(0) // num_splits // Hkv).to(gl.int64)
    i_kv_head = gl.program_id(0) // num_splits % Hkv
    p_k = p_key + i_b * stride_key[0] + i_kv_head.to(gl.int64) * stride_key[1]
    p_v = p_value + i_b * stride_value[0] + i_kv_head.to(gl.int64) * stride_value[1]
    ring = split_hopper.make_ring(p_k, p_v, BLOCK_N, BLOCK_D, NUM_SLOTS)
    queries = split_hopper.make_queries(p_query.dtype.element_ty, BLOCK_M, HELD_ROWS, BLOCK_D)

    # Row r of the packed tile is head r % G of query token r // G.
    LANES: gl.constexpr = BLOCK_D // 8
    copy: gl.constexpr = gl.BlockedLayout([1, 1, 8], [1, 32 // LANES, LANES], [1, gl.num_warps(), 1], [2, 1, 0])
    o_row = offsets(1, HELD_ROWS, copy)
    o_q = (i_kv_head * G + (o_row if IS_SINGLE_TOKEN else o_row % G)).to(gl.int64) * stride_query[1]
    if not IS_SINGLE_TOKEN:
        o_q += (o_row // G).to(gl.int64) * stride_query[2]
    p_q = p_query + i_b * stride_query[0] + o_q + offsets(2, BLOCK_D, copy)
    m_q = (o_row < G * Q) & (offsets(2, BLOCK_D, copy) < D)

    step = num_splits * BLOCK_N
    start, end = split_hopper.load_range_hint(p_range, stride_range, i_b, S)
    low, high = masks.visible_bounds(start, end, end - Q, end - 1, window, IS_CAUSAL, HAS_WINDOW)
    first = low + i_split * BLOCK_N
    split_hopper.prefetch(ring, first, step, S, STRIDE_K, STRIDE_V, D, PREFETCHED_SLOTS)
    gdc_wait()
    # Not before: the kernels behind the next one would start as well, and crowd onto some of the processors.
    gdc_launch_dependents()
    async_copy.async_copy_global_to_shared(queries.slice(0, HELD_ROWS, dim=1), p_q, mask=m_q)
    if p_range is not None:
        start, end = masks.load_kv_range(p_range, stride_range, i_b, S)
        # The compiler would put it off until it is needed.
        gl.thread_barrier()
    split_hopper.start_ring(ring, first, step, high, STRIDE_K, STRIDE_V, D)
    if p_range is not None:
        true_low, true_high = masks.visible_bounds(start, end, end - Q, end - 1, window, IS_CAUSAL, HAS_WINDOW)
        true_first = true_low + i_split * BLOCK_N
        split_hopper.restart_ring(ring, first, high, true_first, true_high, step, STRIDE_K, STRIDE_V, D)
        first = true_first
        high = true_high
    # The bounds of a single token are its whole mask.
    b_o, b_max, b_sum = split_hopper.attend(
        queries, ring, first, step, high, end - Q, G, window, to_log2, STRIDE_K, STRIDE_V, D,
        IS_CAUSAL and not IS_SINGLE_TOKEN, HAS_WINDOW and not IS_SINGLE_TOKEN,
    )  # fmt: skip
    b_o, b_max, b_sum = split_hopper.add_warps(b_o, b_max, b_sum, to_log2, HELD_ROWS)

    layout: gl.constexpr = b_o.type.layout
    o_row = gl.arange(0, HELD_ROWS, layout=gl.SliceLayout(0, gl.SliceLayout(2, layout)))[None, :]
    m_row = o_row < G * Q
    o_head = i_kv_head * G + (o_row if IS_SINGLE_TOKEN else o_row % G)
    o_token = o_row * 0 if IS_SINGLE_TOKEN else o_row // G
    i_row = (i_b * Hkv * G + o_head) * Q + o_token
    if IS_SPLIT:
        i_part = i_split.to(gl.int64) * num_rows + i_row
        split_hopper.store_partial(p_partial, num_splits, num_rows, i_part, b_o, b_max, b_sum, m_row, D)
    else:
        b_o, b_lse = split_hopper.finish(b_o, b_max, b_sum, p_sinks, o_head, m_row, to_natural)
        o_y = o_head.to(gl.int64) * stride_output[1] + o_token.to(gl.int64) * stride_output[2]
        o_d = offsets(2, BLOCK_D, layout)
        p_o = p_output + i_b * stride_output[0] + o_y[:, :, None] + o_d
        gl.store(p_o, b_o.to(p_output.dtype.element_ty), mask=m_row[:, :, None] & (o_d < D))
        if p_lse is not None:
            gl.store(p_lse + i_row, b_lse, mask=m_row)


def decode_attention(
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
    num_splits: int,
    prefetched_slots: int,
    tiles: RingTiles,
) -> None:
    """As `decode.decode_attention`, for what `shares.is_served_by_ring` accepts."""
    batch, num_query_heads, query_len, head_dim = query.shape
    num_kv_heads = key.shape[1]
    group = num_query_heads // num_kv_heads
    scores = softmax.score_scale(scale, softcap=0.0)
    partials = combine.allocate_partials(output, num_splits) if num_splits > 1 else None
    _decode_kernel(
        (batch * num_kv_heads * num_splits,),
        query,
        key,
        value,
        output,
        lse,
        partials,
        kv_range,
        sinks,
        query.stride()[:3],
        key.stride()[:2],
        value.stride()[:2],
        output.stride()[:3],
        None if kv_range is None else kv_range.stride(),
        num_kv_heads,
        group,
        query_len,
        key.shape[2],
        scores.to_log2,
        scores.to_natural,
        window,
        num_splits,
        batch * num_query_heads * query_len,
        STRIDE_K=key.stride(2),
        STRIDE_V=value.stride(2),
        D=head_dim,
        BLOCK_D=padded_head_dim(head_dim),
        BLOCK_M=tiles.block_m,
        HELD_ROWS=tiles.held_rows,
        BLOCK_N=tiles.block_n,
        NUM_SLOTS=tiles.num_slots,
        PREFETCHED_SLOTS=prefetched_slots,
        IS_CAUSAL=is_causal,
        HAS_WINDOW=window > 0,
        IS_SINGLE_TOKEN=query_len == 1,
        IS_SPLIT=partials is not None,
        num_warps=tiles.num_warps,
        maxnreg=split_hopper.MAX_REGISTERS,
        launch_pdl=True,
    )
    if partials is not None:
        combine.combine_splits(
            partials, output, lse, num_splits=num_splits, sinks=sinks, scores=scores, is_dependent=True
        )
