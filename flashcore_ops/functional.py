"""The typed Python face of the ops."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flashcore_ops import ops as _ops  # noqa: F401  (registers torch.ops.flashcore)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kv_range: Tensor | None = None,
    scale: float | None = None,
    is_causal: bool = True,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    num_splits: int = 0,
    cu_seqlens_q: Tensor | None = None,
) -> Tensor:
    """Softmax attention over the visible part of a KV cache, for inference.

    Row i of Q query tokens sits at column `end - Q + i`: causal is aligned to the bottom right, so that new tokens
    attend to a filled cache. With `kv_range[b] = (start, end)`, what the rows see (1) for Q=2 of S=5 slots:

        (0, 5)       (0, 4)       (1, 5)       (0, 5), window=2
        1 1 1 1 0    1 1 1 0 0    0 1 1 1 0    0 0 1 1 0
        1 1 1 1 1    1 1 1 1 0    0 1 1 1 1    0 0 0 1 1

    and for Q=5 of S=2, `(0, 2)`: rows 0 to 2 see nothing, row 3 sees slot 0, row 4 sees both.

    Args:
        query: `[B, Hq, Q, D]`, float16, bfloat16 or float32; any strides with a contiguous last dim. D is a multiple
            of 8 from 16 to 256.
        key: `[B, Hkv, S, D]`, where Hq is a multiple of Hkv.
        value: `[B, Hkv, S, Dv]`, Dv under the same rule as D.
        kv_range: int32 `[B, 2]` on query's device: batch b sees slots `start <= j < end`. The host never reads it.
            end is clamped to [0, S], then start to [0, end]. None means all S slots. Left padding is start, a static
            cache's length is end. Slots that no row sees may hold anything, NaN included.
        scale: factor of the scores, any finite number; `D ** -0.5` if None.
        is_causal: whether a row sees no column behind its own.
        window: with n > 0 (causal only), a row sees its own column and the n - 1 before it.
        softcap: with c > 0 (at most 2**100), scores become `c * tanh(score / c)` before the mask.
        sinks: `[Hq]`, query's dtype or float32: a score of each head that joins the softmax's denominator only. It is
            neither scaled nor capped.
        num_splits: how many programs may share one KV range at decode; 0 chooses. Fixing it fixes the order of
            summation. The CPU and prefill ignore it.
        cu_seqlens_q: int32 `[N + 1]` on query's device, for N sequences packed into a batch of one: the rows of
            sequence n are `cu_seqlens_q[n] <= i < cu_seqlens_q[n + 1]`, and as if they were a batch of their own they
            see the slots `kv_range[n]`, now `[N, 2]`, or without kv_range the slots of their own numbers. Starts at
            0, never falls; the host never reads it. Rows behind the last sequence see nothing.

    Returns:
        `[B, Hq, Q, Dv]` in query's dtype, stored `[B, Q, Hq, Dv]`. A row that sees nothing is 0.

    Raises:
        ShapeError, DtypeError, DeviceError, LayoutError, OptionError: an argument is not as above.
        GradientError: grad mode is on and an input requires grad.

    Source: FlashAttention-2 (arXiv 2307.08691) for the tiling, Flash-Decoding for the split over the cache,
    arXiv 2309.17453 for sinks.

    Example:
        >>> import torch
        >>> from flashcore_ops import attention
        >>> query = torch.randn(1, 8, 1, 64)                      # one new token of 8 heads
        >>> key, value = torch.randn(2, 1, 2, 128, 64).unbind()   # a cache of 128 slots, 2 KV heads
        >>> kv_range = torch.tensor([[0, 37]], dtype=torch.int32)  # of which 37 are filled
        >>> attention(query, key, value, kv_range).shape
        torch.Size([1, 8, 1, 64])
        >>> cu_seqlens = torch.tensor([0, 50, 128], dtype=torch.int32)  # two sequences, one behind the other
        >>> attention(torch.randn(1, 8, 128, 64), key, value, cu_seqlens_q=cu_seqlens).shape
        torch.Size([1, 8, 128, 64])
    """
    return torch.ops.flashcore.attention(
        *(query, key, value, kv_range, scale),
        *(is_causal, window, softcap, sinks, num_splits, cu_seqlens_q),
    )


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
    num_splits: int = 0,
    cu_seqlens_q: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`attention`, and the log of its softmax denominator, so that partial results can be merged.

    Args and Raises: as `attention`. To merge partial results, pass sinks to exactly one of them.

    Returns:
        The output, and the natural log-sum-exp of each row's visible scores, sink included: float32 `[B, Hq, Q]`.
        A row that sees nothing gives its sink, or -inf.

    Example:
        >>> import torch
        >>> from flashcore_ops import attention, attention_with_lse
        >>> query = torch.randn(1, 4, 1, 32)
        >>> key, value = torch.randn(2, 1, 4, 100, 32).unbind()
        >>> near, near_lse = attention_with_lse(query, key[:, :, 60:], value[:, :, 60:])
        >>> far, far_lse = attention_with_lse(query, key[:, :, :60], value[:, :, :60])
        >>> share = torch.sigmoid(near_lse - far_lse)[..., None]
        >>> merged = share * near + (1 - share) * far
        >>> torch.allclose(merged, attention(query, key, value), atol=1e-6)
        True
    """
    return torch.ops.flashcore.attention_with_lse(
        *(query, key, value, kv_range, scale),
        *(is_causal, window, softcap, sinks, num_splits, cu_seqlens_q),
    )


def append_kv_(key_cache: Tensor, value_cache: Tensor, key: Tensor, value: Tensor, positions: Tensor) -> None:
    """Writes each row's T new tokens into consecutive slots of its static cache, in place.

    Args:
        key_cache: `[B, Hkv, S, D]`, float16, bfloat16 or float32, changed in place.
        value_cache: `[B, Hkv, S, Dv]`, changed in place; memory of its own, never a half of one tensor with key_cache.
        key, value: `[B, Hkv, T, D]` and `[B, Hkv, T, Dv]`, in the caches' dtype.
        positions: int32 or int64 `[B]` on the caches' device: token t of row b goes to slot `positions[b] + t`.
            Tokens that fall outside [0, S) are dropped one by one.

    Raises:
        ShapeError, DtypeError, DeviceError, LayoutError: an argument is not as above, or memory overlaps.
        GradientError: grad mode is on and an input requires grad.

    Example:
        >>> import torch
        >>> from flashcore_ops import append_kv_
        >>> key_cache, value_cache = torch.zeros(2, 4, 64, 32), torch.zeros(2, 4, 64, 32)
        >>> key, value = torch.ones(2, 4, 1, 32), torch.ones(2, 4, 1, 32)
        >>> append_kv_(key_cache, value_cache, key, value, positions=torch.tensor([5, 9]))
        >>> key_cache[:, 0, :, 0].nonzero().tolist()
        [[0, 5], [1, 9]]
    """
    torch.ops.flashcore.append_kv_(key_cache, value_cache, key, value, positions)


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
    num_splits: int = 0,
    next_weight: Tensor | None = None,
) -> Tensor:
    """Decode's fused form: rotates one new token a row, appends it to its static cache, and attends.

    The new token stands in column and slot `end - 1`. Rotations are computed in float32 and rounded once to the
    tensors' dtype; scores use the key as it is stored.

    Args:
        query: `[B, Hq, 1, D]`, not rotated, float16, bfloat16 or float32; any strides with a contiguous last dim. D
            is a multiple of 8 from 16 to 256.
        key: `[B, Hkv, 1, D]`, not rotated, where Hq is a multiple of Hkv.
        value: `[B, Hkv, 1, Dv]`, Dv under the same rule as D.
        cos, sin: `[B or 1, 1, D]` in query's dtype, each half of D the same, as transformers' rotary embeddings give
            them: the result is `x * cos + cat(-x2, x1) * sin` for the halves x1, x2 of x.
        key_cache: `[B, Hkv, S, D]`, changed in place.
        value_cache: `[B, Hkv, S, Dv]`, changed in place; memory of its own, never a half of one tensor with key_cache.
        kv_range: int32 `[B, 2]` on query's device, (start, end): end counts the new token. start is clamped to
            [0, end]. The host never reads it.
        scale, window, softcap, sinks, num_splits: as `attention`.
        next_weight: a contiguous tensor that the next kernel reads, such as the weight of the output projection, for a
            GPU to bring near while attention leaves its memory idle. It changes no result.

    Returns:
        `[B, Hq, 1, Dv]` in query's dtype, stored `[B, 1, Hq, Dv]`. A row with end above S or below 1 has no slot: it
        writes nothing and is NaN, so that a step past the end of the cache shows. A row that sees nothing is 0.

    Raises:
        ShapeError, DtypeError, DeviceError, LayoutError, OptionError: an argument is not as above, or memory overlaps.
        GradientError: grad mode is on and an input requires grad.

    Source: RoFormer (arXiv 2104.09864) for the rotation; `attention` for the rest.

    Example:
        >>> import torch
        >>> from flashcore_ops import rope_append_attention
        >>> key_cache, value_cache = torch.zeros(1, 2, 128, 64), torch.zeros(1, 2, 128, 64)
        >>> query, key, value = torch.randn(1, 12, 1, 64).split([8, 2, 2], dim=1)  # of one projection
        >>> angle = 37 * 10_000 ** -(torch.arange(64) % 32 / 32)
        >>> kv_range = torch.tensor([[0, 38]], dtype=torch.int32)  # the new token goes to slot 37
        >>> output = rope_append_attention(
        ...     query, key, value, angle.cos()[None, None], angle.sin()[None, None], key_cache, value_cache, kv_range
        ... )
        >>> output.shape, torch.equal(value_cache[:, :, 37:38], value)
        (torch.Size([1, 8, 1, 64]), True)
    """
    return torch.ops.flashcore.rope_append_attention(
        *(query, key, value, cos, sin, key_cache, value_cache, kv_range),
        *(scale, window, softcap, sinks, num_splits, next_weight),
    )


def linear(
    input: Tensor,
    weights: Sequence[Tensor],
    norm_weight: Tensor | None = None,
    eps: float = 1e-6,
    residual: Tensor | None = None,
    is_gated: bool = False,
    has_constant_weights: bool = False,
) -> Tensor:
    """Linear layers over one input in one launch, with the norm before and the gate or sum behind them.

    Made for decode, where a few rows meet large weights: on a GPU each weight is read once for up to 32 rows, and again
    for every 32 rows more (float32: for every row). One row and several are summed in different orders.

    Args:
        input: `[..., K]`, float16, bfloat16 or float32.
        weights: one to three contiguous `[N_i, K]`, as in nn.Linear; their products stand side by side.
        norm_weight: `[K]`, the weight of an RMSNorm that comes first; None for none.
        eps: of that norm.
        residual: of the result's shape; added last.
        is_gated: SwiGLU, `silu(input @ weights[0].T) * (input @ weights[1].T)`, for two weights of one shape.
        has_constant_weights: a promise that no GPU work queued right before this call writes the weights, as with a
            model's parameters. They may then be fetched while that work still runs.

    Returns:
        `[..., sum N_i]`, or `[..., N]` if gated, contiguous.

    Raises:
        ShapeError, DtypeError, DeviceError, LayoutError, OptionError: an argument is not as above.
        GradientError: grad mode is on and an input requires grad.

    Example:
        >>> x, gate, up = torch.ones(2, 1, 8), torch.ones(4, 8), torch.ones(4, 8)
        >>> linear(x, [gate, up], norm_weight=torch.ones(8), is_gated=True).shape
        torch.Size([2, 1, 4])
    """
    output: Tensor = torch.ops.flashcore.linear(
        input, weights, norm_weight, eps, residual, is_gated, has_constant_weights
    )
    return output
