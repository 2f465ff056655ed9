"""Decode: attention of a few query tokens over a long cache, split over programs (Flash-Decoding).

The query tokens and heads of one GQA group are packed into the rows of one tile, so that each K and V element is read
once per KV head. Every program takes its tiles of the range from kv_range on the device, so one launch (and one CUDA
graph) stays balanced at every length. The kernel of combine.py adds the splits up.
"""

import torch
import triton
import triton.language as tl

from csrc_free_kernels import combine, dependent_launch, masks, shares, softmax
from csrc_free_kernels.decode_tuning import DecodePlan, RingTiles
from csrc_free_kernels.launch import Launcher
from csrc_free_kernels.tuning import ceil_div, next_power_of_2


@Launcher
@triton.jit(do_not_specialize=["Hkv", "G", "Q", "S", "window", "num_splits", "num_row_tiles", "num_rows"])
def _decode_kernel(
    p_query,
    p_key,
    p_value,
    p_output,
    p_lse,
    p_partial,
    p_range,
    p_sinks,
    stride_query,
    stride_key,
    stride_value,
    stride_output,
    stride_range,
    Hkv,
    G,
    Q,
    S,
    before_cap,
    softcap,
    to_log2,
    to_natural,
    window,
    num_splits,
    num_row_tiles,
    num_rows,
    D: tl.constexpr,
    Dv: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    QUERY_SIGN: tl.constexpr,
    IS_SINGLE_TOKEN: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    PREFETCHED_SLOTS: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
):
    MASK_D: tl.constexpr = D != BLOCK_D
    MASK_DV: tl.constexpr = Dv != BLOCK_DV
    i_split = tl.program_id(0) % num_splits
    i_tile = tl.program_id(0) // num_splits % num_row_tiles
    i_bh = tl.program_id(0) // (num_splits * num_row_tiles)
    i_b = (i_bh // Hkv).to(tl.int64)
    i_kv_head = i_bh % Hkv
    p_k = p_key + i_b * stride_key[0] + i_kv_head.to(tl.int64) * stride_key[1]
    p_v = p_value + i_b * stride_value[0] + i_kv_head.to(tl.int64) * stride_value[1]

    # Row r of the packed tile is head r % G of query token r // G.
    o_packed = i_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    o_token = o_packed // G
    o_head = i_kv_head * G + o_packed % G
    m_row = o_packed < G * Q
    # The tile's first and last tokens, counted from the end of the range.
    first_token = i_tile * BLOCK_M // G - Q
    last_token = tl.minimum((i_tile * BLOCK_M + BLOCK_M - 1) // G - Q, -1)
    p_q = p_query + i_b * stride_query[0] + o_head.to(tl.int64)[:, None] * stride_query[1]
    p_q = p_q + o_token.to(tl.int64)[:, None] * stride_query[2]
    if IS_DEPENDENT:
        # Rows past the last ask for the tensor's first row.
        dependent_launch.prefetch_rows(tl.where(m_row[:, None], p_q, p_query), D)
        start, end = masks.load_kv_range(p_range, stride_range, i_b, S, IS_HINT=True)
        low, high = masks.visible_bounds(start, end, end + first_token, end + last_token, window, IS_CAUSAL, HAS_WINDOW)
        shares.prefetch(
            p_k, stride_key[2], p_v, stride_value[2], low, S, i_split, num_splits, D, Dv, BLOCK_N, PREFETCHED_SLOTS
        )
    dependent_launch.wait(IS_DEPENDENT)
    # Not before: the kernels behind the next one would start as well, and crowd onto some of the processors.
    dependent_launch.launch_dependents(IS_DEPENDENT)
    start, end = masks.load_kv_range(p_range, stride_range, i_b, S)
    o_column = end - Q + o_token
    low, high = masks.visible_bounds(start, end, end + first_token, end + last_token, window, IS_CAUSAL, HAS_WINDOW)

    o_d = tl.arange(0, BLOCK_D)
    o_dv = tl.arange(0, BLOCK_DV)
    m_d = o_d < D
    m_dv = o_dv < Dv
    o_first = tl.arange(0, BLOCK_N).to(tl.int64)
    p_k = p_k + o_first[:, None] * stride_key[2] + o_d[None, :]
    p_v = p_v + o_first[:, None] * stride_value[2] + o_dv[None, :]

    # [BLOCK_M, BLOCK_D]
    b_q = softmax.sign_query(masks.load_tile(p_q + o_d[None, :], m_row, m_d, MASK_D).to(DOT_DTYPE), QUERY_SIGN)
    b_o = tl.zeros([BLOCK_M, BLOCK_DV], dtype=tl.float32)
    b_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    for i_n in tl.range(low + i_split * BLOCK_N, high, num_splits * BLOCK_N):
        o_slot = i_n + tl.arange(0, BLOCK_N)
        m_slot = o_slot < high
        first = tl.cast(i_n, tl.int64)
        # [BLOCK_N, BLOCK_D] and [BLOCK_N, BLOCK_DV]
        b_k = masks.load_tile(p_k + first * stride_key[2], m_slot, m_d, MASK_D).to(DOT_DTYPE)
        b_v = masks.load_tile(p_v + first * stride_value[2], m_slot, m_dv, MASK_DV).to(DOT_DTYPE)
        b_s = softmax.scores(b_q, b_k, before_cap, softcap, HAS_SOFTCAP)
        # The bounds of a single token are its whole mask.
        b_s = masks.mask_scores(
            b_s, o_slot, o_column, low, high, window,
            IS_CAUSAL and not IS_SINGLE_TOKEN, HAS_WINDOW and not IS_SINGLE_TOKEN,
        )  # fmt: skip
        b_p, b_o, b_max, b_sum = softmax.update(b_s, b_o, b_max, b_sum, to_log2)
        b_o = softmax.accumulate(b_o, b_p, b_v)

    i_row = (i_b * Hkv * G + o_head) * Q + o_token
    if IS_SPLIT:
        i_part = i_split.to(tl.int64) * num_rows + i_row
        combine.store_partial(p_partial, num_splits, num_rows, i_part, b_o, b_max, b_sum, m_row, Dv)
    else:
        b_sink = softmax.load_sinks(p_sinks, o_head, m_row)
        b_o, b_lse = softmax.finish(b_o, b_max, b_sum, b_sink, to_natural)
        p_o = p_output + i_b * stride_output[0] + o_head.to(tl.int64)[:, None] * stride_output[1]
        p_o = p_o + o_token.to(tl.int64)[:, None] * stride_output[2] + o_dv[None, :]
        tl.store(p_o, b_o.to(p_output.dtype.element_ty), mask=m_row[:, None] & m_dv[None, :])
        if p_lse is not None:
            tl.store(p_lse + i_row, b_lse, mask=m_row)


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
    softcap: float,
    plan: DecodePlan,
    is_dependent: bool,
) -> None:
    """Writes attention into output `[B, Hq, Q, Dv]` and, if given, lse (contiguous `[B, Hq, Q]`); B, Q > 0.

    A plan with a ring serves what `shares.is_served_by_ring` accepts, and is always launched dependent.
    """
    tiles, num_splits = plan.tiles, plan.num_splits
    if isinstance(tiles, RingTiles):
        # Imported here alone: it needs a Triton that has Gluon.
        from csrc_free_kernels import decode_hopper

        decode_hopper.decode_attention(
            *(query, key, value, output, lse),
            kv_range=kv_range,
            sinks=sinks,
            scale=scale,
            is_causal=is_causal,
            window=window,
            num_splits=num_splits,
            prefetched_slots=plan.prefetched_slots,
            tiles=tiles,
        )
        return
    batch, num_query_heads, query_len, head_dim = query.shape
    num_kv_heads, value_dim = key.shape[1], value.shape[3]
    group = num_query_heads // num_kv_heads
    num_row_tiles = ceil_div(group * query_len, tiles.block_m)
    num_rows = batch * num_query_heads * query_len
    scores = softmax.score_scale(scale, softcap)
    partials = combine.allocate_partials(output, num_splits) if num_splits > 1 else None
    _decode_kernel(
        (batch * num_kv_heads * num_row_tiles * num_splits,),
        query,
        key,
        value,
        output,
        lse,
        partials,
        kv_range,
        sinks,
        query.stride()[:3],
        key.stride()[:3],
        value.stride()[:3],
        output.stride()[:3],
        None if kv_range is None else kv_range.stride(),
        num_kv_heads,
        group,
        query_len,
        key.shape[2],
        scores.before_cap,
        scores.softcap,
        scores.to_log2,
        scores.to_natural,
        window,
        num_splits,
        num_row_tiles,
        num_rows,
        D=head_dim,
        Dv=value_dim,
        BLOCK_D=next_power_of_2(head_dim),
        BLOCK_DV=next_power_of_2(value_dim),
        BLOCK_M=tiles.block_m,
        BLOCK_N=tiles.block_n,
        IS_CAUSAL=is_causal,
        HAS_WINDOW=window > 0,
        HAS_SOFTCAP=softcap > 0,
        QUERY_SIGN=scores.query_sign,
        IS_SINGLE_TOKEN=query_len == 1,
        IS_SPLIT=partials is not None,
        PREFETCHED_SLOTS=plan.prefetched_slots,
        DOT_DTYPE=softmax.dot_dtype(query.dtype),
        IS_DEPENDENT=is_dependent,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        **dependent_launch.launch_options(is_dependent),
    )
    if partials is not None:
        combine.combine_splits(
            partials, output, lse, num_splits=num_splits, sinks=sinks, scores=scores, is_dependent=is_dependent
        )
