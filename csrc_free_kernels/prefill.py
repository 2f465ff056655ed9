"""Prefill: tiled attention for many query tokens (FlashAttention-2, arXiv 2307.08691). Portable Triton."""

import torch
import triton
import triton.language as tl

from csrc_free_kernels import masks, softmax, tile_order
from csrc_free_kernels.launch import Launcher
from csrc_free_kernels.tuning import HopperTiles, Tiles, ceil_div, next_power_of_2, padded_head_dim


@Launcher
@triton.jit(do_not_specialize=["B", "Hq", "G", "Q", "S", "section_heads", "window", "num_sequences"])
def _prefill_kernel(
    p_query,
    p_key,
    p_value,
    p_output,
    p_lse,
    p_range,
    p_sinks,
    p_cu_seqlens,
    stride_query,
    stride_key,
    stride_value,
    stride_output,
    stride_range,
    B,
    Hq,
    G,
    Q,
    S,
    section_heads,
    before_cap,
    softcap,
    to_log2,
    to_natural,
    window,
    num_sequences,
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
    DOT_DTYPE: tl.constexpr,
    BLOCK_SEQUENCES: tl.constexpr,
):
    MASK_D: tl.constexpr = D != BLOCK_D
    MASK_DV: tl.constexpr = Dv != BLOCK_DV
    num_row_tiles = tl.num_programs(0) // (B * Hq)
    i_bh, i_m = tile_order.head_and_row_tile(tl.program_id(0), B * Hq // section_heads, section_heads, num_row_tiles)
    i_b = (i_bh // Hq).to(tl.int64)
    i_h = i_bh % Hq
    if p_cu_seqlens is None:
        first_row = 0
        num_rows = Q
        start, end = masks.load_kv_range(p_range, stride_range, i_b, S)
    else:
        first_row, num_rows, i_m, start, end = masks.load_sequence_tile(
            p_cu_seqlens, p_range, stride_range, num_row_tiles - 1 - i_m, num_sequences, Q, S, BLOCK_M, BLOCK_SEQUENCES
        )

    # Rows of the batch or sequence, and of the tensors.
    o_own = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_row = first_row + o_own
    o_first = tl.arange(0, BLOCK_N).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    o_dv = tl.arange(0, BLOCK_DV)
    m_row = o_own < num_rows
    m_d = o_d < D
    m_dv = o_dv < Dv
    i_q_head = i_h.to(tl.int64)
    i_kv_head = (i_h // G).to(tl.int64)
    p_q = p_query + i_b * stride_query[0] + i_q_head * stride_query[1]
    p_q = p_q + o_row.to(tl.int64)[:, None] * stride_query[2] + o_d[None, :]
    p_k = p_key + i_b * stride_key[0] + i_kv_head * stride_key[1]
    p_k = p_k + o_first[:, None] * stride_key[2] + o_d[None, :]
    p_v = p_value + i_b * stride_value[0] + i_kv_head * stride_value[1]
    p_v = p_v + o_first[:, None] * stride_value[2] + o_dv[None, :]

    # [BLOCK_M, BLOCK_D]
    b_q = softmax.sign_query(masks.load_tile(p_q, m_row, m_d, MASK_D).to(DOT_DTYPE), QUERY_SIGN)
    b_o = tl.zeros([BLOCK_M, BLOCK_DV], dtype=tl.float32)
    b_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros([BLOCK_M], dtype=tl.float32)

    first_column = end - num_rows + i_m * BLOCK_M
    last_column = tl.minimum(first_column + BLOCK_M, end) - 1
    o_column = first_column + tl.arange(0, BLOCK_M)
    low, high = masks.visible_bounds(start, end, first_column, last_column, window, IS_CAUSAL, HAS_WINDOW)
    # Whole tiles in [full_low, full_high) are seen by every row.
    full_low = low
    full_high = high
    if IS_CAUSAL:
        full_high = tl.minimum(high, first_column + 1)
    if HAS_WINDOW:
        full_low = last_column - window + 1

    # One loop for full and edge tiles: with a loop for each, ptxas 12.8 took the value tile's address in the second
    # from registers that only the first sets, and the first may not run.
    for i_n in tl.range(low, high, BLOCK_N):
        o_slot = i_n + tl.arange(0, BLOCK_N)
        m_slot = o_slot < high
        first = tl.cast(i_n, tl.int64)
        # [BLOCK_N, BLOCK_D] and [BLOCK_N, BLOCK_DV]
        b_k = masks.load_tile(p_k + first * stride_key[2], m_slot, m_d, MASK_D).to(DOT_DTYPE)
        b_v = masks.load_tile(p_v + first * stride_value[2], m_slot, m_dv, MASK_DV).to(DOT_DTYPE)
        b_s = softmax.scores(b_q, b_k, before_cap, softcap, HAS_SOFTCAP)
        if (i_n < full_low) | (i_n + BLOCK_N > full_high):
            b_s = masks.mask_scores(b_s, o_slot, o_column, low, high, window, IS_CAUSAL, HAS_WINDOW)
        b_p, b_o, b_max, b_sum = softmax.update(b_s, b_o, b_max, b_sum, to_log2)
        b_o = softmax.accumulate(b_o, b_p, b_v)

    b_sink = softmax.load_sinks(p_sinks, i_h + tl.zeros([BLOCK_M], dtype=tl.int32), m_row)
    b_o, b_lse = softmax.finish(b_o, b_max, b_sum, b_sink, to_natural)
    p_o = p_output + i_b * stride_output[0] + i_q_head * stride_output[1]
    p_o = p_o + o_row.to(tl.int64)[:, None] * stride_output[2] + o_dv[None, :]
    tl.store(p_o, b_o.to(p_output.dtype.element_ty), mask=m_row[:, None] & m_dv[None, :])
    if p_lse is not None:
        tl.store(p_lse + (i_b * Hq + i_h) * Q + o_row, b_lse, mask=m_row)


def is_computed_by_hopper(dtype: torch.dtype, head_dim: int, value_dim: int, scale: float, softcap: float) -> bool:
    """Whether Hopper's kernel computes attention of this kind, as far as shapes and options tell.

    Example:
        >>> is_computed_by_hopper(torch.bfloat16, 128, 128, scale=0.1, softcap=0.0)
        True
        >>> is_computed_by_hopper(torch.bfloat16, 128, 128, scale=0.1, softcap=50.0)
        False
    """
    return (
        dtype.itemsize == 2
        and softcap == 0
        and softmax.score_scale(scale, softcap).query_sign == 1
        and padded_head_dim(head_dim) == padded_head_dim(value_dim)
    )


def is_served_by_hopper(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    softcap: float,
    cu_seqlens: torch.Tensor | None,
) -> bool:
    """Whether Hopper's kernel computes this, whose copy engine wants 16-byte strides."""
    if cu_seqlens is not None or not is_computed_by_hopper(query.dtype, query.shape[3], value.shape[3], scale, softcap):
        return False
    return all(
        tensor.numel() > 0
        and tensor.data_ptr() % 16 == 0
        and all(stride > 0 and stride % 8 == 0 for stride in tensor.stride()[:3])
        for tensor in (query, key, value)
    )


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
    softcap: float,
    cu_seqlens: torch.Tensor | None,
    tiles: Tiles | HopperTiles,
    section_heads: int,
) -> None:
    """Writes attention into output `[B, Hq, Q, Dv]` and, if given, lse (contiguous `[B, Hq, Q]`); B, Q > 0.

    cu_seqlens is contiguous; with it B is 1. Hopper's tiles serve what `is_served_by_hopper` accepts. section_heads
    divides the B * Hq heads: so many are computed at a time.
    """
    if isinstance(tiles, HopperTiles):
        # Imported here alone: it needs a Triton that has Gluon.
        from csrc_free_kernels import prefill_hopper

        prefill_hopper.prefill_attention(
            *(query, key, value, output, lse),
            kv_range=kv_range,
            sinks=sinks,
            scale=scale,
            is_causal=is_causal,
            window=window,
            tiles=tiles,
            section_heads=section_heads,
        )
        return
    batch, num_query_heads, query_len, head_dim = query.shape
    value_dim = value.shape[3]
    scores = softmax.score_scale(scale, softcap)
    num_sequences = 0 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    # Each sequence, and what is behind the last, may end in a tile of its own.
    num_tiles = ceil_div(query_len, tiles.block_m) + (0 if cu_seqlens is None else num_sequences + 1)
    grid = (num_tiles * batch * num_query_heads,)
    _prefill_kernel(
        grid,
        query,
        key,
        value,
        output,
        lse,
        kv_range,
        sinks,
        cu_seqlens,
        query.stride()[:3],
        key.stride()[:3],
        value.stride()[:3],
        output.stride()[:3],
        None if kv_range is None else kv_range.stride(),
        batch,
        num_query_heads,
        num_query_heads // key.shape[1],
        query_len,
        key.shape[2],
        section_heads,
        scores.before_cap,
        scores.softcap,
        scores.to_log2,
        scores.to_natural,
        window,
        num_sequences,
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
        DOT_DTYPE=softmax.dot_dtype(query.dtype),
        BLOCK_SEQUENCES=next_power_of_2(num_sequences + 1),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
