"""What a query row may see: jit helpers shared by the attention kernels."""

import triton
import triton.language as tl


@triton.jit
def clamp_range(start, end, S):
    """(start, end) with end in [0, S] and start in [0, end]."""
    end = tl.minimum(tl.maximum(end, 0), S)
    return tl.minimum(tl.maximum(start, 0), end), end


@triton.jit
def load_kv_range(p_range, stride_range, i_b, S, IS_HINT: tl.constexpr = False):
    """(start, end) of batch i_b: end clamped to [0, S], then start to [0, end]. Without a pointer, (0, S).

    IS_HINT: for a range that may be about to change: nothing of it is kept for a later load.
    """
    if p_range is None:
        start = S * 0
        end = S
    else:
        p_start = p_range + i_b * stride_range[0]
        end = tl.load(p_start + stride_range[1], volatile=IS_HINT)
        start, end = clamp_range(tl.load(p_start, volatile=IS_HINT), end, S)
    return start, end


@triton.jit
def load_sequence_tile(
    p_cu_seqlens, p_range, stride_range, i_tile, N, T, S, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Row tile number i_tile of N sequences packed into T rows: (first row, rows, tile of its own, start, end).

    The rows behind the last sequence are one more, which sees nothing; numbers past the last tile have no rows.
    """
    o_n = tl.arange(0, BLOCK_N)
    # What is not a sequence begins and ends at T.
    b_first = tl.load(p_cu_seqlens + o_n, mask=o_n <= N, other=T)
    b_last = tl.load(p_cu_seqlens + o_n + 1, mask=o_n < N, other=T)
    b_first = tl.where(o_n == 0, 0, tl.minimum(tl.maximum(b_first, 0), T))
    b_last = tl.minimum(tl.maximum(b_last, 0), T)
    b_rows = tl.maximum(b_last - b_first, 0)
    b_tiles = tl.cdiv(b_rows, BLOCK_M)
    # The tiles up to each sequence's end: those of earlier sequences are no more than i_tile.
    m_earlier = tl.cumsum(b_tiles, 0) <= i_tile
    i_seq = tl.sum(m_earlier.to(tl.int32), 0)
    m_own = o_n == i_seq
    first_row = tl.sum(tl.where(m_own, b_first, 0), 0)
    num_rows = tl.sum(tl.where(m_own, b_rows, 0), 0)
    # The longest tiles of a sequence first.
    i_last = tl.sum(tl.where(m_own, b_tiles, 0), 0) - 1
    i_own = tl.maximum(i_last - i_tile + tl.sum(tl.where(m_earlier, b_tiles, 0), 0), 0)
    if p_range is None:
        start = tl.where(i_seq < N, first_row, 0)
        end = tl.where(i_seq < N, first_row + num_rows, 0)
    else:
        p_start = p_range + i_seq.to(tl.int64) * stride_range[0]
        end = tl.load(p_start + stride_range[1], mask=i_seq < N, other=0)
        start = tl.load(p_start, mask=i_seq < N, other=0)
    start, end = clamp_range(start, end, S)
    return first_row, num_rows, i_own, start, end


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
