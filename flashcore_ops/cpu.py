"""CPU kernels of the ops. torch's scaled_dot_product_attention serves what it can; the rest is dense float32."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from flashcore_ops import reference


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kv_range: Tensor | None,
    scale: float,
    is_causal: bool,
    window: int,
    softcap: float,
    sinks: Tensor | None,
    num_splits: int,
    cu_seqlens_q: Tensor | None,
    output: Tensor,
    lse: Tensor | None,
) -> None:
    """Writes attention's result `[B, Hq, Q, Dv]` into output, and `[B, Hq, Q]` into lse if given.

    num_splits has no meaning on the CPU.
    """
    if cu_seqlens_q is not None:
        for rows, own_range in _sequences(cu_seqlens_q, query.shape[2], kv_range):
            attention(
                *(query[:, :, rows], key, value, own_range, scale, is_causal, window, softcap, sinks, num_splits),
                cu_seqlens_q=None,
                output=output[:, :, rows],
                lse=None if lse is None else lse[:, :, rows],
            )
        return
    output.zero_()
    if lse is not None:
        lse.copy_(sinks[:, None].expand_as(lse) if sinks is not None else torch.tensor(-torch.inf))
    for batch, rows, slots in _visible_blocks(query, key, kv_range, is_causal, window):
        q, k, v = query[batch, :, rows], key[batch, :, slots], value[batch, :, slots]
        if is_served_by_sdpa(softcap, has_sinks=sinks is not None, has_lse=lse is not None):
            output[batch, :, rows] = _torch_attention(q, k, v, scale, is_causal, window)
            continue
        block_output, block_lse = reference.attention_with_lse(
            q.float(),
            k.float(),
            v.float(),
            scale=scale,
            is_causal=is_causal,
            window=window,
            softcap=softcap,
            sinks=sinks,
        )
        output[batch, :, rows] = block_output
        if lse is not None:
            lse[batch, :, rows] = block_lse


def is_served_by_sdpa(softcap: float, *, has_sinks: bool, has_lse: bool) -> bool:
    """Whether torch's SDPA computes this; all else is dense float32."""
    return softcap == 0 and not has_sinks and not has_lse


def append_kv_(key_cache: Tensor, value_cache: Tensor, key: Tensor, value: Tensor, positions: Tensor) -> None:
    """Writes each row's new tokens into its cache, from slot `positions[b]`; see `reference.append_kv_`."""
    num_slots, num_tokens = key_cache.shape[2], key.shape[2]
    for row, first in enumerate(positions.tolist()):
        slots = slice(min(max(first, 0), num_slots), min(max(first + num_tokens, 0), num_slots))
        tokens = slice(slots.start - first, slots.stop - first) if slots.start < slots.stop else slice(0, 0)
        key_cache[row, :, slots] = key[row, :, tokens]
        value_cache[row, :, slots] = value[row, :, tokens]


def rope_append_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    kv_range: Tensor,
    scale: float,
    window: int,
    softcap: float,
    sinks: Tensor | None,
    num_splits: int,
    next_weight: Tensor | None,
    output: Tensor,
) -> None:
    """Rotates and appends one new token a row, and writes attention's result `[B, Hq, 1, Dv]` into output.

    num_splits and next_weight have no meaning on the CPU.
    """
    end = kv_range[:, 1].long()
    append_kv_(key_cache, value_cache, reference.rotate(key, cos, sin), value, end - 1)
    attention(
        reference.rotate(query, cos, sin),
        key_cache,
        value_cache,
        kv_range,
        scale=scale,
        is_causal=True,
        window=window,
        softcap=softcap,
        sinks=sinks,
        num_splits=num_splits,
        cu_seqlens_q=None,
        output=output,
        lse=None,
    )
    output[(end < 1) | (end > key_cache.shape[2])] = torch.nan


def _sequences(cu_seqlens_q: Tensor, num_rows: int, kv_range: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
    """Yields (rows, their range `[1, 2]`) of each sequence, and of the rows behind the last, which see nothing."""
    bounds = [0, *cu_seqlens_q[1:].clamp(0, num_rows).tolist()]
    for n, (first, last) in enumerate(pairwise(bounds)):
        own_range = torch.tensor([[first, last]], dtype=torch.int32) if kv_range is None else kv_range[n : n + 1]
        yield slice(first, last), own_range
    yield slice(bounds[-1], num_rows), torch.zeros(1, 2, dtype=torch.int32)


def _visible_blocks(
    query: Tensor, key: Tensor, kv_range: Tensor | None, is_causal: bool, window: int
) -> Iterator[tuple[slice, slice, slice]]:
    """Yields (batch, rows, slots): neighbours of equal range, their rows that see anything, the slots those see.

    Cutting the tensors to the block keeps whatever the unseen slots hold, NaN included, out of the arithmetic.
    """
    batch_size, query_len, kv_len = query.shape[0], query.shape[2], key.shape[2]
    ranges = [[0, kv_len]] * batch_size if kv_range is None else kv_range.tolist()
    first = 0
    for row in range(1, batch_size + 1):
        if row < batch_size and ranges[row] == ranges[first]:
            continue
        end = min(max(ranges[first][1], 0), kv_len)
        start = min(max(ranges[first][0], 0), end)
        num_rows = min(query_len, end - start) if is_causal else query_len
        if window > 0:
            start = max(start, end - num_rows - window + 1)
        if start < end and num_rows > 0:
            yield slice(first, row), slice(query_len - num_rows, query_len), slice(start, end)
        first = row


def _torch_attention(query: Tensor, key: Tensor, value: Tensor, scale: float, is_causal: bool, window: int) -> Tensor:
    batch, num_query_heads, query_len, head_dim = query.shape
    num_kv_heads, kv_len = key.shape[1], key.shape[2]
    if query_len == 1:
        # The group's heads become rows of one tile, so that each K and V element is read once.
        packed = query.reshape(batch, num_kv_heads, num_query_heads // num_kv_heads, head_dim)
        output = scaled_dot_product_attention(packed, key, value, scale=scale)
        return output.reshape(batch, num_query_heads, 1, value.shape[3])
    # torch multiplies the -inf of its own causal mask by scale, so that only a positive one may use it.
    is_square_causal = is_causal and query_len == kv_len and (window == 0 or window >= kv_len) and scale > 0
    mask = None
    if is_causal and not is_square_causal:
        mask = reference.visible_slots(query_len, kv_len, window=window, device=query.device)
    return scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=is_square_causal,
        scale=scale,
        enable_gqa=num_query_heads != num_kv_heads,
    )


def linear(
    input: Tensor,
    weights: list[Tensor],
    norm_weight: Tensor | None,
    eps: float,
    residual: Tensor | None,
    is_gated: bool,
    has_constant_weights: bool,
    output: Tensor,
) -> None:
    """Writes the products of `[..., K]` rows with each weight, side by side, into output `[..., N]`."""
    output.copy_(reference.linear(input, weights, norm_weight, eps, residual, is_gated))
