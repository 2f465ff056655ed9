"""What a query row may see: jit helpers shared by the attention kernels."""

import triton
import triton.language as tl


@triton.jit
def load_kv_range(p_range, stride_range, i_b, S):
    """(start, end) of batch i_b: end clamped to [0, S], then start to [0, end]. Without a pointer, (0, S)."""
    if p_range is None:
        start = S * 0
        end = S
    else:
        p_start = p_range + i_b * stride_range[0]
        end = tl.minimum(tl.maximum(tl.load(p_start + stride_range[1]), 0), S)
        start = tl.minimum(tl.maximum(tl.load(p_start), 0), end)
    return start, end


@triton.jit
def visible_bounds(start, end, first_column, last_column, window, IS_CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr):
    """The slots [low, high) that some row at columns first_column..last_column sees."""
    low = start
    high = end
    if IS_CAUSAL:
        high = tl.minimum(end, last_column + 1)
    if HAS_WINDOW:
        low = tl.maximum(start, first_column - window + 1)
    return low, tl.maximum(low, high)


@triton.jit
def mask_scores(b_s, o_slot, o_column, low, high, window, IS_CAUSAL: tl.constexpr, HAS_WINDOW: tl.constexpr):
    """b_s [BLOCK_M, BLOCK_N] with -inf where the row at o_column may not see the slot."""
    m_s = ((o_slot >= low) & (o_slot < high))[None, :]
    if IS_CAUSAL:
        m_s = m_s & (o_slot[None, :] <= o_column[:, None])
    if HAS_WINDOW:
        m_s = m_s & (o_slot[None, :] > o_column[:, None] - window)
    return tl.where(m_s, b_s, float("-inf"))


@triton.jit
def load_tile(p_tile, m_n, m_d, MASK_D: tl.constexpr):
    """[BLOCK_N, BLOCK_D] with 0 where masked: an unseen slot may hold NaN, and 0 * NaN is NaN."""
    if MASK_D:
        return tl.load(p_tile, mask=m_n[:, None] & m_d[None, :], other=0.0)
    else:
        return tl.load(p_tile, mask=m_n[:, None], other=0.0)
