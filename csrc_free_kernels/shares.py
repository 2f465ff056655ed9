"""What the split-KV kernels have in common: each split's tiles of a range of slots, asked for ahead of time.

Splits take turns, tile by tile. What a head's programs read at a time then lies together, and memory serves a long
range faster than one stretch for each.
"""

import triton
import triton.language as tl

from csrc_free_kernels import dependent_launch


@triton.jit
def prefetch(
    p_key, stride_key, p_value, stride_value, low, S, i_split, num_splits,
    D: tl.constexpr, Dv: tl.constexpr, BLOCK_N: tl.constexpr, PREFETCHED_SLOTS: tl.constexpr,
):  # fmt: skip
    """Asks for the split's first slots from `low` on, of one head's keys and values, while the kernel ahead still runs.

    The range may be about to change, so `low` is a hint: any slot inside the cache will do, if there is one.
    """
    if S > 0:
        o_ahead = tl.arange(0, PREFETCHED_SLOTS)
        o_slot = low + (o_ahead // BLOCK_N * num_splits + i_split) * BLOCK_N + o_ahead % BLOCK_N
        o_slot = tl.maximum(tl.minimum(o_slot, S - 1), 0).to(tl.int64)[:, None]
        dependent_launch.prefetch_rows(p_key + o_slot * stride_key, D)
        dependent_launch.prefetch_rows(p_value + o_slot * stride_value, Dv)
