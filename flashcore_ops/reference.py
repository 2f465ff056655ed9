"""What the ops mean, in plain torch.

Every tensor may be of any floating dtype: in float64 these functions are the oracle of the tests, in a kernel's own
dtype they are the plain PyTorch attention that the kernel's error is compared with.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor


def visible_slots(
    query_len: int,
    kv_len: int,
    kv_range: Tensor | None = None,
    is_causal: bool = True,
    window: int = 0,
    device: torch.device | str | None = None,
) -> Tensor:
    """Which KV slots each query row may see.

    Args:
        query_len: Q, the number of query tokens.
        kv_len: S, the number of KV slots.
        kv_range: int32 `[B, 2]`, the slots `start <= j < end` of each batch. None means all S.
        is_causal: row i, at column `end - Q + i`, sees no column behind its own.
        window: with n > 0, a row sees its own column and the n - 1 before it.
        device: where the mask goes; kv_range's own device when that is given.

    Returns:
        bool `[B, Q, S]`, or `[1, Q, S]` without kv_range.

    Example:
        >>> visible_slots(2, 5).int()[0]
        tensor([[1, 1, 1, 1, 0],
                [1, 1, 1, 1, 1]], dtype=torch.int32)
    """
    if kv_range is None:
        kv_range = torch.tensor([[0, kv_len]], device=device)
    end = kv_range[:, 1].long().clamp(0, kv_len)
    start = kv_range[:, 0].long().clamp(min=0).minimum(end)
    start, end = start[:, None, None], end[:, None, None]
    slot = torch.arange(kv_len, device=kv_range.device)
    column = end - query_len + torch.arange(query_len, device=kv_range.device)[None, :, None]
    visible = ((slot >= start) & (slot < end)).expand(-1, query_len, -1)
    if is_causal:
        visible = visible & (slot <= column)
    if window > 0:
        visible = visible & (slot > column - window)
    return visible


def visible_slots_of_sequences(
    cu_seqlens_q: Tensor,
    query_len: int,
    kv_len: int,
    kv_range: Tensor | None = None,
    is_causal: bool = True,
    window: int = 0,
) -> Tensor:
    """Which KV slots each row of packed sequences may see.

    Args:
        cu_seqlens_q: integer `[N + 1]`, the first row of each sequence and the end of the last.
        query_len, kv_len, is_causal, window: see `visible_slots`.
        kv_range: `[N, 2]`, the slots of each sequence; without it those with the numbers of its rows.

    Returns:
        bool `[1, Q, S]`.

    Example:
        >>> visible_slots_of_sequences(torch.tensor([0, 2, 3]), 4, 4).int()[0]
        tensor([[1, 0, 0, 0],
                [1, 1, 0, 0],
                [0, 0, 1, 0],
                [0, 0, 0, 0]], dtype=torch.int32)
    """
    bounds = cu_seqlens_q.clamp(0, query_len).tolist()
    visible = torch.zeros(1, query_len, kv_len, dtype=torch.bool, device=cu_seqlens_q.device)
    for n, (first, last) in enumerate(pairwise([0, *bounds[1:]])):
        own = torch.tensor([[first, last]], device=cu_seqlens_q.device) if kv_range is None else kv_range[n : n + 1]
        visible[:, first:last] = visible_slots(last - first, kv_len, own, is_causal, window)
    return visible


def attention_with_lse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kv_range: Tensor | None = None,
    scale: float | None = None,
    is_causal: bool = True,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention and the log of its softmax denominator, with every score held in memory.

    Args:
        query: `[B, Hq, Q, D]`.
        key, value: `[B, Hkv, S, D]` and `[B, Hkv, S, Dv]`.
        kv_range, is_causal, window: see `visible_slots`.
        scale: factor of the scores, `D ** -0.5` if None.
        softcap: with c > 0, scores become `c * tanh(score / c)` before the mask.
        sinks: `[Hq]`, a score of each head that joins the denominator only.
        cu_seqlens_q: see `visible_slots_of_sequences`; then B is 1.

    Returns:
        The output `[B, Hq, Q, Dv]` and the log-sum-exp `[B, Hq, Q]` in float32 (float64 for float64 inputs).
        A row that sees nothing gives 0, and its sink or -inf.
    """
    batch, num_query_heads, query_len, head_dim = query.shape
    num_kv_heads, kv_len = key.shape[1], key.shape[2]
    if cu_seqlens_q is None:
        visible = visible_slots(query_len, kv_len, kv_range, is_causal, window, device=query.device)
    else:
        visible = visible_slots_of_sequences(cu_seqlens_q, query_len, kv_len, kv_range, is_causal, window)
    # Slots that no row sees may hold NaN, and 0 * NaN is NaN.
    unused = ~visible.any(dim=1)[:, None, :, None]
    key, value = key.masked_fill(unused, 0), value.masked_fill(unused, 0)
    group = num_query_heads // num_kv_heads
    key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    hidden = ~visible[:, None]

    scores = query @ key.transpose(-1, -2) * (head_dim**-0.5 if scale is None else scale)
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(hidden, -torch.inf)
    if sinks is not None:
        column = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(batch, -1, query_len, 1)
        scores = torch.cat([scores, column], dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., :kv_len].masked_fill(hidden, 0)
    lse_dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return weights @ value, torch.logsumexp(scores.to(lse_dtype), dim=-1)


def append_kv_(key_cache: Tensor, value_cache: Tensor, key: Tensor, value: Tensor, positions: Tensor) -> None:
    """Writes each row's T new tokens into slots `positions[b]`, `positions[b] + 1`, ... of its cache.

    Args:
        key_cache, value_cache: `[B, Hkv, S, D]` and `[B, Hkv, S, Dv]`, changed in place.
        key, value: `[B, Hkv, T, D]` and `[B, Hkv, T, Dv]`.
        positions: integer `[B]`. Tokens that fall outside the cache are dropped one by one.
    """
    num_slots = key_cache.shape[2]
    for row, first in enumerate(positions.tolist()):
        for token in range(key.shape[2]):
            slot = first + token
            if 0 <= slot < num_slots:
                key_cache[row, :, slot] = key[row, :, token]
                value_cache[row, :, slot] = value[row, :, token]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding by halves, in float32 or wider and rounded once to x's dtype.

    Args:
        x: `[B, H, T, D]`.
        cos, sin: `[B or 1, T, D]`, each half of D the same, as transformers' rotary embeddings give them.

    Source: RoFormer (arXiv 2104.09864), in the layout of transformers' rotate_half.

    Example:
        >>> quarter_turn = torch.tensor([[[0.0, 1.0, 0.0, 1.0]]]), torch.tensor([[[1.0, 0.0, 1.0, 0.0]]])
        >>> rotate(torch.tensor([[[[1.0, 2.0, 3.0, 4.0]]]]), *quarter_turn)
        tensor([[[[-3.,  2.,  1.,  4.]]]])
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    first, second = wide.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return (wide * cos.unsqueeze(1).to(wide.dtype) + turned * sin.unsqueeze(1).to(wide.dtype)).to(x.dtype)


def rope_append_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    kv_range: Tensor,
    scale: float | None = None,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """Rotates one new token a row, writes it into slot `end - 1` of the caches, and attends over `start..end - 1`.

    Args:
        query: `[B, Hq, 1, D]`, not rotated.
        key, value: `[B, Hkv, 1, D]`, not rotated, and `[B, Hkv, 1, Dv]`.
        cos, sin: see `rotate`.
        key_cache, value_cache: `[B, Hkv, S, D]` and `[B, Hkv, S, Dv]`, changed in place.
        kv_range: integer `[B, 2]`, (start, end) of each row.
        scale, window, softcap, sinks: see `attention_with_lse`.

    Returns:
        `[B, Hq, 1, Dv]`. A row whose slot is not in the cache writes nothing and is NaN.
    """
    end = kv_range[:, 1].long()
    append_kv_(key_cache, value_cache, rotate(key, cos, sin), value, end - 1)
    output, _ = attention_with_lse(
        rotate(query, cos, sin),
        key_cache,
        value_cache,
        kv_range=kv_range,
        scale=scale,
        window=window,
        softcap=softcap,
        sinks=sinks,
    )
    has_no_slot = (end < 1) | (end > key_cache.shape[2])
    return output.masked_fill(has_no_slot[:, None, None, None], torch.nan)


def linear(
    input: Tensor,
    weights: Sequence[Tensor],
    norm_weight: Tensor | None = None,
    eps: float = 1e-6,
    residual: Tensor | None = None,
    is_gated: bool = False,
) -> Tensor:
    """Linear layers over one input, step by step as a Hugging Face decoder layer takes them.

    Args:
        input: `[..., K]`.
        weights: of `[N_i, K]`; their products stand side by side in the result.
        norm_weight: `[K]` of an RMSNorm that comes first, None for none.
        eps: of the norm.
        residual: added last, of the result's shape.
        is_gated: `silu(input @ weights[0].T) * (input @ weights[1].T)` instead, for weights of one shape.

    Returns:
        `[..., sum N_i]`, or `[..., N]` if gated.

    Example:
        >>> x, eye = torch.tensor([[3.0, 4.0]]), torch.eye(2)
        >>> linear(x, [eye, 2 * eye], residual=torch.ones(1, 4))
        tensor([[4., 5., 7., 9.]])
    """
    if norm_weight is not None:
        # transformers norms in float32 and rounds before the weight.
        wide = input.to(torch.promote_types(input.dtype, torch.float32))
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        input = norm_weight * wide.to(input.dtype)
    products = [torch.nn.functional.linear(input, weight) for weight in weights]
    if is_gated:
        output = torch.nn.functional.silu(products[0]) * products[1]
    else:
        output = products[0] if len(products) == 1 else torch.cat(products, dim=-1)
    return output if residual is None else residual + output
