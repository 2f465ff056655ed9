"""Decode's fused form: rotate one new token's query and key, append its key and value to the cache, attend.

Split over programs as decode.py is. The cached slots come from memory; the new token goes through split 0 alone, from
registers, so that no program reads the slot that another one writes.
"""

import torch
import triton
import triton.language as tl

from csrc_free_kernels import combine, dependent_launch, masks, shares, softmax
from csrc_free_kernels.decode_tuning import PREFETCHED_BYTES, DecodePlan, RingTiles
from csrc_free_kernels.launch import Launcher
from csrc_free_kernels.tuning import ceil_div, next_power_of_2


@triton.jit
def load_slot_range(p_range, stride_range, i_b, S):
    """(start, end, whether slot end - 1 exists). Without that slot the range is empty."""
    p_start = p_range + i_b * stride_range[0]
    end = tl.load(p_start + stride_range[1])
    has_slot = (end >= 1) & (end <= S)
    end = tl.where(has_slot, end, 0)
    start = tl.minimum(tl.maximum(tl.load(p_start), 0), end)
    return start, end, has_slot


@triton.jit
def _load_rotated(p_rows, m_row, p_cos, p_sin, D: tl.constexpr, BLOCK_D: tl.constexpr, DOT_DTYPE: tl.constexpr):
    """Rows of D elements at p_rows [N, 1]: x * cos + rotate_half(x) * sin in float32, rounded once. [N, BLOCK_D]."""
    HALF: tl.constexpr = D // 2
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    # A remainder, not a choice of two: the compiler sees that its neighbours are neighbours in memory.
    o_partner = (o_d + HALF) % D
    m_x = m_row[:, None] & m_d[None, :]
    b_x = tl.load(p_rows + o_d[None, :], mask=m_x, other=0.0).to(tl.float32)
    b_partner = tl.load(p_rows + o_partner[None, :], mask=m_x, other=0.0).to(tl.float32)
    b_cos = tl.load(p_cos + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_sin = tl.load(p_sin + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_sin = tl.where(o_d < HALF, -b_sin, b_sin)
    return (b_x * b_cos[None, :] + b_partner * b_sin[None, :]).to(DOT_DTYPE)


@triton.jit
def _prefetch_next(p_next, num_lines, BLOCK: tl.constexpr):
    """Asks for the program's share of the next kernel's lines."""
    ELEMENTS: tl.constexpr = dependent_launch.LINE_BYTES // (p_next.dtype.element_ty.primitive_bitwidth // 8)
    share = tl.cdiv(num_lines, tl.num_programs(0))
    first = tl.program_id(0) * share
    last = tl.minimum(first + share, num_lines) - 1
    for i_line in tl.range(first, last + 1, BLOCK):
        o_line = tl.minimum(i_line + tl.arange(0, BLOCK), last)
        dependent_launch.prefetch_l2(p_next + o_line.to(tl.int64) * ELEMENTS)


@Launcher
@triton.jit(do_not_specialize=["Hkv", "G", "S", "window", "num_splits", "num_row_tiles", "num_rows", "num_next_lines"])
def _rope_decode_kernel(
    p_query,
    p_key,
    p_value,
    p_cos,
    p_sin,
    p_key_cache,
    p_value_cache,
    p_output,
    p_partial,
    p_range,
    p_sinks,
    p_next,
    stride_query,
    stride_key,
    stride_value,
    stride_cos,
    stride_sin,
    stride_key_cache,
    stride_value_cache,
    stride_output,
    stride_range,
    Hkv,
    G,
    S,
    before_cap,
    softcap,
    to_log2,
    to_natural,
    window,
    num_splits,
    num_row_tiles,
    num_rows,
    num_next_lines,
    D: tl.constexpr,
    Dv: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    QUERY_SIGN: tl.constexpr,
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
    p_k = p_key_cache + i_b * stride_key_cache[0] + i_kv_head.to(tl.int64) * stride_key_cache[1]
    p_v = p_value_cache + i_b * stride_value_cache[0] + i_kv_head.to(tl.int64) * stride_value_cache[1]
    if IS_DEPENDENT:
        start, end = masks.load_kv_range(p_range, stride_range, i_b, S, IS_HINT=True)
        low, _ = masks.visible_bounds(start, end, end - 1, end - 1, window, False, HAS_WINDOW)
        shares.prefetch(
            p_k, stride_key_cache[2], p_v, stride_value_cache[2], low, S, i_split, num_splits, D, Dv, BLOCK_N,
            PREFETCHED_SLOTS,
        )  # fmt: skip
    dependent_launch.wait(IS_DEPENDENT)
    start, end, has_slot = load_slot_range(p_range, stride_range, i_b, S)

    # The cached slots [low, high) that the new token sees.
    low, _ = masks.visible_bounds(start, end, end - 1, end - 1, window, False, HAS_WINDOW)
    high = tl.maximum(low, end - 1)

    # Row r of the tile is head r of the group.
    o_row = i_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    o_head = i_kv_head * G + o_row
    m_row = o_row < G
    o_d = tl.arange(0, BLOCK_D)
    o_dv = tl.arange(0, BLOCK_DV)
    m_d = o_d < D
    m_dv = o_dv < Dv
    p_q = p_query + i_b * stride_query[0] + o_head.to(tl.int64)[:, None] * stride_query[1]
    p_new_k = p_key + i_b * stride_key[0] + i_kv_head.to(tl.int64) * stride_key[1] + tl.zeros([1, 1], dtype=tl.int64)
    p_new_v = p_value + i_b * stride_value[0] + i_kv_head.to(tl.int64) * stride_value[1]
    p_c = p_cos + i_b * stride_cos
    p_s = p_sin + i_b * stride_sin
    p_k = p_k + o_d[None, :]
    p_v = p_v + o_dv[None, :]

    is_first = i_split == 0
    # [BLOCK_M, BLOCK_D], [1, BLOCK_D] and [1, BLOCK_DV]
    b_q = _load_rotated(p_q, m_row, p_c, p_s, D, BLOCK_D, DOT_DTYPE)
    b_new_k = _load_rotated(p_new_k, tl.full([1], is_first, tl.int1), p_c, p_s, D, BLOCK_D, DOT_DTYPE)
    b_new_v = tl.load(p_new_v + o_dv[None, :], mask=m_dv[None, :] & is_first, other=0.0)
    # Row tiles of one head store the same bits.
    i_slot = (end - 1).to(tl.int64)
    m_new = is_first & has_slot
    tl.store(p_k + i_slot * stride_key_cache[2], b_new_k.to(p_key.dtype.element_ty), mask=m_d[None, :] & m_new)
    tl.store(p_v + i_slot * stride_value_cache[2], b_new_v, mask=m_dv[None, :] & m_new)

    # Split 0 starts from the new token: its weight is exp2(0) = 1 until a larger score comes.
    b_q = softmax.sign_query(b_q, QUERY_SIGN)
    # As a product with 16 copies of the key: a sum over each row would hold the query in registers once more.
    b_copies = tl.broadcast_to(b_new_k, [16, BLOCK_D])
    b_new_s = tl.max(softmax.scores(b_q, b_copies, before_cap, softcap, HAS_SOFTCAP), 1)
    sees_new = is_first & (start < end)
    b_max = tl.where(sees_new, b_new_s, float("-inf"))
    # Without a slot no tile follows: a NaN denominator stays, and makes NaN of the output, through the combination too.
    b_sum = tl.zeros([BLOCK_M], dtype=tl.float32) + tl.where(has_slot, tl.where(sees_new, 1.0, 0.0), float("nan"))
    b_o = tl.zeros([BLOCK_M, BLOCK_DV], dtype=tl.float32) + tl.where(sees_new, b_new_v.to(tl.float32), 0.0)

    for i_n in tl.range(low + i_split * BLOCK_N, high, num_splits * BLOCK_N):
        o_slot = i_n + tl.arange(0, BLOCK_N)
        m_slot = o_slot < high
        # Not added up once for all, which took too many registers.
        o_far = o_slot.to(tl.int64)[:, None]
        # [BLOCK_N, BLOCK_D] and [BLOCK_N, BLOCK_DV]
        b_k = masks.load_tile(p_k + o_far * stride_key_cache[2], m_slot, m_d, MASK_D).to(DOT_DTYPE)
        b_v = masks.load_tile(p_v + o_far * stride_value_cache[2], m_slot, m_dv, MASK_DV).to(DOT_DTYPE)
        b_s = softmax.scores(b_q, b_k, before_cap, softcap, HAS_SOFTCAP)
        b_s = tl.where(m_slot[None, :], b_s, float("-inf"))
        b_p, b_o, b_max, b_sum = softmax.update(b_s, b_o, b_max, b_sum, to_log2)
        b_o = softmax.accumulate(b_o, b_p, b_v)

    # Only now: weights must not stand in the way of the cache's slots, neither these nor what the next kernel asks for.
    if p_next is not None:
        _prefetch_next(p_next, num_next_lines, BLOCK=256)
    dependent_launch.launch_dependents(IS_DEPENDENT)
    i_row = i_b * Hkv * G + o_head
    if IS_SPLIT:
        i_part = i_split.to(tl.int64) * num_rows + i_row
        combine.store_partial(p_partial, num_splits, num_rows, i_part, b_o, b_max, b_sum, m_row, Dv)
    else:
        b_sink = softmax.load_sinks(p_sinks, o_head, m_row)
        b_o, _ = softmax.finish(b_o, b_max, b_sum, b_sink, to_natural)
        p_o = p_output + i_b * stride_output[0] + o_head.to(tl.int64)[:, None] * stride_output[1] + o_dv[None, :]
        tl.store(p_o, b_o.to(p_output.dtype.element_ty), mask=m_row[:, None] & m_dv[None, :])


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
    softcap: float,
    next_weight: torch.Tensor | None,
    plan: DecodePlan,
    is_dependent: bool,
) -> None:
    """Appends the rotated key and value `[B, Hkv, 1, D or Dv]`, and writes attention into output `[B, Hq, 1, Dv]`.

    cos and sin are `[B or 1, 1, D]`; B > 0. next_weight is contiguous. A plan with a ring serves what
    `shares.is_served_by_ring` accepts, and is always launched dependent.
    """
    tiles, num_splits = plan.tiles, plan.num_splits
    num_next_lines = 0
    if next_weight is not None and is_dependent:
        num_next_lines = min(next_weight.nbytes, PREFETCHED_BYTES) // dependent_launch.LINE_BYTES.value
    next_weight = next_weight if num_next_lines > 0 else None
    if isinstance(tiles, RingTiles):
        # Imported here alone: it needs a Triton that has Gluon.
        from csrc_free_kernels import rope_decode_hopper

        rope_decode_hopper.rope_append_attention(
            *(query, key, value, cos, sin, key_cache, value_cache, output),
            kv_range=kv_range,
            sinks=sinks,
            scale=scale,
            window=window,
            next_weight=next_weight,
            num_next_lines=num_next_lines,
            num_splits=num_splits,
            prefetched_slots=plan.prefetched_slots,
            tiles=tiles,
        )
        return
    batch, num_query_heads, _, head_dim = query.shape
    num_kv_heads, value_dim = key_cache.shape[1], value_cache.shape[3]
    group = num_query_heads // num_kv_heads
    num_row_tiles = ceil_div(group, tiles.block_m)
    scores = softmax.score_scale(scale, softcap)
    partials = combine.allocate_partials(output, num_splits) if num_splits > 1 else None
    _rope_decode_kernel(
        (batch * num_kv_heads * num_row_tiles * num_splits,),
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
        key_cache.stride()[:3],
        value_cache.stride()[:3],
        output.stride()[:2],
        kv_range.stride(),
        num_kv_heads,
        group,
        key_cache.shape[2],
        scores.before_cap,
        scores.softcap,
        scores.to_log2,
        scores.to_natural,
        window,
        num_splits,
        num_row_tiles,
        batch * num_query_heads,
        num_next_lines,
        D=head_dim,
        Dv=value_dim,
        BLOCK_D=next_power_of_2(head_dim),
        BLOCK_DV=next_power_of_2(value_dim),
        BLOCK_M=tiles.block_m,
        BLOCK_N=tiles.block_n,
        HAS_WINDOW=window > 0,
        HAS_SOFTCAP=softcap > 0,
        QUERY_SIGN=scores.query_sign,
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
            partials, output, None, num_splits=num_splits, sinks=sinks, scores=scores, is_dependent=is_dependent
        )
