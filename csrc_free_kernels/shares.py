"""What the split-KV kernels have in common: who runs, and each split's tiles of a range, asked for ahead of time.

Splits take turns, tile by tile. What a head's programs read at a time then lies together, and memory serves a long
range faster than one stretch for each.
"""

import torch
import triton
import triton.language as tl

from csrc_free_kernels import dependent_launch
from csrc_free_kernels.decode_tuning import max_ring_rows
from csrc_free_kernels.prefill import is_computed_by_hopper

# Copies are made of 16 bytes; the compiler sees no smaller common divisor of strides than 16 elements.
_ALIGNMENT = 16
# Of a slot, in elements: a tile's offsets, of up to 128 slots, are int32.
_MAX_STRIDE = 2**24


def has_ring(dtype: torch.dtype, head_dim: int, value_dim: int, *, num_rows: int, scale: float, softcap: float) -> bool:
    """Whether Hopper's split-KV kernels compute this, as far as shapes and options tell; num_rows = group * query_len.

    Example:
        >>> has_ring(torch.bfloat16, 128, 128, num_rows=4, scale=0.1, softcap=0.0)
        True
        >>> has_ring(torch.bfloat16, 72, 72, num_rows=4, scale=0.1, softcap=0.0)
        False
    """
    return (
        is_computed_by_hopper(dtype, head_dim, value_dim, scale, softcap)
        and head_dim == value_dim
        and head_dim % _ALIGNMENT == 0
        and num_rows <= max_ring_rows(head_dim)
    )


def is_served_by_ring(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, softcap: float
) -> bool:
    """Whether they run on Hopper, whose copies want 16-byte addresses; key and value are the caches."""
    num_rows = query.shape[1] // key.shape[1] * query.shape[2]
    if not has_ring(query.dtype, query.shape[3], value.shape[3], num_rows=num_rows, scale=scale, softcap=softcap):
        return False
    return (
        all(
            tensor.data_ptr() % 16 == 0 and all(stride % _ALIGNMENT == 0 for stride in tensor.stride()[:3])
            for tensor in (query, key, value)
        )
        and max(key.stride(2), value.stride(2)) < _MAX_STRIDE
    )


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
