"""Attention for callers that keep their own (key, value) tuples."""

from __future__ import annotations

import torch
from torch import Tensor

from flashcore_ops.errors import DeviceError, DtypeError, OptionError, ShapeError
from flashcore_ops.functional import attention

KeyValue = tuple[Tensor, Tensor]


def attention_with_kv_cache(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past_key_value: KeyValue | None = None,
    is_causal: bool = True,
    update_cache: bool = True,
    num_query_heads: int | None = None,
    num_kv_heads: int | None = None,
    *,
    kv_range: Tensor | None = None,
    scale: float | None = None,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    num_splits: int = 0,
) -> tuple[Tensor, KeyValue | None]:
    """Attends over past and new keys and values; returns the output and the grown (key, value).

    Nothing is changed in place: growing copies the past. A preallocated cache with `append_kv_` and `kv_range` costs
    less per token.

    Args:
        query: `[B, Hq, Q, D]`; with both head counts given also `[B, Q, Hq * D]`.
        key, value: the new tokens, `[B, Hkv, T, D]` and `[B, Hkv, T, Dv]`; with both head counts given also
            `[B, T, Hkv * D]` and `[B, T, Hkv * Dv]`.
        past_key_value: `[B, Hkv, P, D]` and `[B, Hkv, P, Dv]`, as returned by the call before. None for no past.
        is_causal: whether a query row sees no column behind its own; rows align to the last of the P + T columns.
        update_cache: False attends over past and new and returns past_key_value itself.
        num_query_heads, num_kv_heads: Hq and Hkv, given together; needed where heads are merged into the last dim.
        kv_range, scale, window, softcap, sinks, num_splits: as `attention`; kv_range counts the P + T columns.

    Returns:
        The output, `[B, Hq, Q, Dv]` or `[B, Q, Hq * Dv]` as query came, and the (key, value) of all P + T tokens;
        with update_cache=False past_key_value as it came, None included.

    Raises:
        OptionError: only one head count is given.
        ShapeError, DtypeError, DeviceError, LayoutError, GradientError: as `attention`.

    Example:
        >>> import torch
        >>> from flashcore_ops import attention_with_kv_cache
        >>> prompt, token = torch.randn(1, 10, 128), torch.randn(1, 1, 128)
        >>> heads = {"num_query_heads": 4, "num_kv_heads": 4}
        >>> _, past = attention_with_kv_cache(prompt, prompt, prompt, **heads)
        >>> output, past = attention_with_kv_cache(token, token, token, past, **heads)
        >>> output.shape, past[0].shape
        (torch.Size([1, 1, 128]), torch.Size([1, 4, 11, 32]))
    """
    has_merged_heads = query.dim() == 3
    if (num_query_heads is None) != (num_kv_heads is None):
        raise OptionError.explain(
            "num_query_heads, num_kv_heads",
            expected="both or neither",
            got=f"{num_query_heads} and {num_kv_heads}",
            fix="Give both for [B, T, H*D] inputs, neither for [B, H, T, D].",
        )
    if num_query_heads is not None and num_kv_heads is not None:
        query = _split_heads(query, num_query_heads, "query")
        key = _split_heads(key, num_kv_heads, "key")
        value = _split_heads(value, num_kv_heads, "value")
    if past_key_value is None:
        all_key, all_value = key, value
    elif len(past_key_value) != 2:
        raise ShapeError.explain(
            "past_key_value",
            expected="a (key, value) pair",
            got=f"{len(past_key_value)} entries",
            fix="Pass what the call before returned.",
        )
    else:
        all_key = _concatenate(past_key_value[0], key, "past_key_value[0]")
        all_value = _concatenate(past_key_value[1], value, "past_key_value[1]")
    output = attention(
        query,
        all_key,
        all_value,
        kv_range=kv_range,
        scale=scale,
        is_causal=is_causal,
        window=window,
        softcap=softcap,
        sinks=sinks,
        num_splits=num_splits,
    )
    if has_merged_heads:
        output = output.transpose(1, 2).flatten(2)
    return output, (all_key, all_value) if update_cache else past_key_value


def _split_heads(tensor: Tensor, num_heads: int, name: str) -> Tensor:
    """`[B, T, H * D]` as `[B, H, T, D]`; a tensor that is so already, as it is."""
    if tensor.dim() == 4 and tensor.shape[1] == num_heads:
        return tensor
    if tensor.dim() != 3 or num_heads < 1 or tensor.shape[2] % num_heads != 0:
        raise ShapeError.explain(
            name,
            expected=f"[B, T, H*D] or [B, H, T, D] with H = {num_heads} heads",
            got=f"{list(tensor.shape)}",
            fix="Pass the head counts of the model's config.",
        )
    return tensor.unflatten(2, (num_heads, -1)).transpose(1, 2)


def _concatenate(past: Tensor, new: Tensor, name: str) -> Tensor:
    """Past and new tokens in one `[B, H, P + T, D]`."""
    if past.dim() != 4 or new.dim() != 4 or past.shape[:2] != new.shape[:2] or past.shape[3] != new.shape[3]:
        raise ShapeError.explain(
            name,
            expected=f"the batch, heads and head dim of the new tokens {list(new.shape)}",
            got=f"{list(past.shape)}",
            fix="Pass what the call before returned.",
        )
    if past.device != new.device:
        raise DeviceError.explain(
            name, expected=f"the new tokens' device {new.device}", got=f"{past.device}", fix="Move it with .to(device)."
        )
    if past.dtype != new.dtype:
        # torch.cat would promote silently.
        raise DtypeError.explain(
            name, expected=f"the new tokens' {new.dtype}", got=f"{past.dtype}", fix="Cast the past or the new tokens."
        )
    return torch.cat([past, new], dim=2)
