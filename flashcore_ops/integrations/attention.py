"""The attention function `fcore`, as Hugging Face's AttentionInterface calls it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from flashcore_ops.errors import OptionError
from flashcore_ops.integrations.call_checks import check_mask, check_options
from flashcore_ops.integrations.dense import dense_attention
from flashcore_ops.integrations.packing import drop_flag, packed_attention, sequence_bounds


def fcore_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer, through `torch.ops.flashcore.attention` or, under a dense mask, the dense path.

    Args:
        module: the layer that asks.
        query: `[B, Hq, Q, D]`, float16, bfloat16 or float32.
        key, value: `[B, Hkv, S, D]`, past and new tokens; a static cache's whole buffer.
        attention_mask: what `create_fcore_mask` returned (None, int32 `[B, 1, 1, 2]`, `[1, 1, 1, N + 1]` or
            `[1, 1, 1, 1]`, or uint8), or a user's own 4-D mask.
        dropout: must be 0.
        scaling: factor on the scores, None for `D ** -0.5`.
        sliding_window: in tokens, None for none.
        softcap: bound c of the scores, which become `c * tanh(score / c)`; None for none.
        s_aux: sinks `[Hq]`, a score of each head that joins the softmax's denominator only; None for none.
        is_causal: overrides the layer's own; must not be False unless attention_mask is dense.
        kwargs: cu_seq_lens_q, int32 `[N + 1]`, tells N packed sequences in the rows of the batch; what else
            transformers hands to its attention functions is not needed.

    Returns:
        `[B, Q, Hq, D]`, and None in the place of attention weights.

    Raises:
        OptionError: dropout, attention weights or bidirectional attention are asked for.
        MaskError: attention_mask or cu_seq_lens_q is malformed, or the two come together.
        UnsupportedModelError: the layer has a feature that is not served.
        FlashCoreError: what `torch.ops.flashcore.attention` raises.

    Source: transformers.integrations.sdpa_attention, whose arguments these are.

    Example:
        >>> import flashcore_ops
        >>> query, key = torch.ones(1, 4, 3, 16), torch.ones(1, 2, 3, 16)
        >>> output, weights = fcore_attention(nn.Module(), query, key, key, None)
        >>> tuple(output.shape), weights
        ((1, 3, 4, 16), None)
    """
    check_options(dropout, kwargs)
    batch, num_heads, query_len, _ = query.shape
    check_mask(attention_mask, (batch, num_heads, query_len, key.shape[2]), query.dtype, kwargs)
    bounds = sequence_bounds(attention_mask, kwargs)
    if attention_mask is not None and attention_mask.dtype != torch.int32:
        return dense_attention(
            *(module, query, key, value, attention_mask), scaling=scaling, softcap=softcap, sinks=s_aux
        )
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise OptionError.explain(
            "is_causal",
            expected="True",
            got="False",
            fix="Set is_causal=False in the model's config before it is built, use a DynamicCache, or pass a 4-D mask.",
        )
    options = (scaling, True, sliding_window or 0, softcap or 0.0, s_aux)
    if bounds is not None:
        return packed_attention(query, key, value, bounds, *options).transpose(1, 2), None
    attention_mask = drop_flag(attention_mask)
    kv_range = None if attention_mask is None else attention_mask[:, 0, 0]
    output = torch.ops.flashcore.attention(query, key, value, kv_range, *options)
    return output.transpose(1, 2), None
