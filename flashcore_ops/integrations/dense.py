"""The dense path: masks that no `kv_range` can express go to Hugging Face's own sdpa, boolean mask and all.

It is exact and slow: the mask takes B * Q * S bytes and no kernel of ours runs. One warning a reason says so.
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
            "but slower. FlashCore's kernels serve causal masks with padding on the left only.",
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
    scaling: float | None,
) -> tuple[Tensor, None]:
    """Attention under any 4-D mask, as Hugging Face's sdpa computes it.

    Args:
        module: the layer that asks.
        query: `[B, Hq, Q, D]`.
        key, value: `[B, Hkv, S, D]`.
        attention_mask: broadcastable to `[B, Hq, Q, S]`; uint8 made by `create_dense_mask`, or a user's own:
            bool (True may be seen) or of query's dtype (added to the scores).
        scaling: factor on the scores, None for `D ** -0.5`.

    Returns:
        `[B, Q, Hq, D]` and None.

    Raises:
        MaskError: attention_mask has another dtype or shape.
    """
    _check_shape(attention_mask, query, key)
    if attention_mask.dtype == torch.uint8:
        attention_mask = attention_mask.bool()
    else:
        _check_dtype(attention_mask, query)
        warn_dense_path("a 4-D attention mask was passed")
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling)


def _check_dtype(attention_mask: Tensor, query: Tensor) -> None:
    if attention_mask.dtype not in (torch.bool, query.dtype):
        raise MaskError.explain(
            "attention_mask",
            expected=f"a 4-D mask of dtype bool, or {query.dtype} to add to the scores",
            got=f"{attention_mask.dtype}",
            fix="Cast it with .to(dtype).",
        )


def _check_shape(attention_mask: Tensor, query: Tensor, key: Tensor) -> None:
    shape = (*query.shape[:3], key.shape[2])
    sizes = zip(attention_mask.shape, shape, strict=False)
    if attention_mask.dim() != 4 or any(size not in (1, full) for size, full in sizes):
        raise MaskError.explain(
            "attention_mask",
            expected=f"a shape that broadcasts to [B, Hq, Q, S] = {list(shape)}",
            got=f"{list(attention_mask.shape)}",
            fix="With a static cache S is the cache's whole length, max_cache_len.",
        )
