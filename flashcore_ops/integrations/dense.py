"""The dense path: masks that no `kv_range` can express go to Hugging Face's own sdpa, boolean mask and all.

It is exact and slow: the mask takes B * Q * S bytes, keys and values are copied, and no kernel of ours runs. One
warning a reason says so. Softcap and sinks, which torch's SDPA does not know, are computed here with every score in
memory.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from flashcore_ops.errors import MaskError

_warned: set[str] = set()


def _warn_dense_path(reason: str) -> None:
    """Warns, once a process for each reason, that attention leaves FlashCore's kernels."""
    if reason not in _warned:
        _warned.add(reason)
        warnings.warn(
            f"FlashCore: {reason}, so attention takes the dense path (torch SDPA with a boolean mask): exact, "
            "but slower. FlashCore's kernels serve causal masks with padding on the left only, and packed sequences.",
            stacklevel=2,
        )


# A warning would break the graph of torch.compile; so marked, it is given while tracing.
warn_dense_path: Callable[[str], None] = torch.compiler.assume_constant_result(_warn_dense_path)


def create_dense_mask(reason: str, **arguments: Any) -> Tensor:
    """Returns uint8 `[B, 1, Q, S]`, 1 where a token may be seen, from the arguments of a mask function."""
    warn_dense_path(reason)
    mask = sdpa_mask(**arguments, allow_is_causal_skip=False, allow_is_bidirectional_skip=False)
    return mask.view(torch.uint8)


def dense_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    *,
    scaling: float | None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, None]:
    """Attention under any 4-D mask, as Hugging Face's sdpa computes it, or its eager if there are softcap or sinks.

    Args:
        module: the layer that asks.
        query: `[B, Hq, Q, D]`.
        key, value: `[B, Hkv, S, D]`. Slots that no row may see can hold NaN.
        attention_mask: broadcastable to `[B, Hq, Q, S]`; uint8 made by `create_dense_mask`, or a user's own:
            bool (True may be seen) or of query's dtype (added to the scores). `check_dense_mask` has accepted it.
        scaling: factor on the scores, None for `D ** -0.5`.
        softcap: bound of the scores before the mask, None for none.
        sinks: `[Hq]`, a score of each head that joins the denominator only, None for none.

    Returns:
        `[B, Q, Hq, D]` and None.
    """
    if attention_mask.dtype == torch.uint8:
        attention_mask = attention_mask.bool()
    else:
        warn_dense_path("a 4-D attention mask was passed")
    key, value = _clear_unseen(attention_mask, key, value)
    if not softcap and sinks is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    output = _attend(query, key, value, attention_mask, scale=scale, softcap=softcap, sinks=sinks)
    return output.transpose(1, 2), None


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    *,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """`[B, Hq, Q, D]`. A row that sees nothing gives some finite number, as in eager attention."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    scores = (query @ key.transpose(-1, -2)).float() * scale  # [B, Hq, Q, S]
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    else:
        scores = scores + attention_mask
    if sinks is not None:
        column = sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat((scores, column), dim=-1)
    return scores.softmax(dim=-1)[..., : key.shape[2]].to(value.dtype) @ value


def _clear_unseen(attention_mask: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values with zeros for what is not finite where no row of a batch may look: times a weight of 0 it
    is NaN. The rest stays, for a row that sees nothing takes the mean of all values in eager attention."""
    is_visible = attention_mask if attention_mask.dtype == torch.bool else attention_mask > -torch.inf
    # [B, 1, S, 1]
    is_seen = is_visible.any(dim=2).any(dim=1)[:, None, :, None]
    return torch.where(is_seen | key.isfinite(), key, 0), torch.where(is_seen | value.isfinite(), value, 0)


def check_dense_mask(attention_mask: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None) -> None:
    """Raises MaskError for a mask that `dense_attention` does not take.

    Args:
        attention_mask: of any dtype and shape.
        shape: `[B, Hq, Q, S]` of the scores.
        dtype: of the queries; None if that is not known yet, when every floating one is accepted.
    """
    if dtype is None:
        is_served = attention_mask.dtype == torch.bool or attention_mask.is_floating_point()
    else:
        is_served = attention_mask.dtype in (torch.bool, dtype)
    # uint8 is what `create_dense_mask` returns.
    if not is_served and attention_mask.dtype != torch.uint8:
        raise MaskError.explain(
            "attention_mask",
            expected=f"a 4-D mask of dtype bool, or {dtype or 'that of the queries'} to add to the scores",
            got=f"{attention_mask.dtype}",
            fix="Cast it with .to(dtype).",
        )
    sizes = zip(attention_mask.shape, shape, strict=False)
    if attention_mask.dim() != 4 or any(size not in (1, full) for size, full in sizes):
        raise MaskError.explain(
            "attention_mask",
            expected=f"a shape that broadcasts to [B, Hq, Q, S] = {list(shape)}",
            got=f"{list(attention_mask.shape)}",
            fix="With a static cache S is the cache's whole length, max_cache_len.",
        )
