"""Argument checks of decode's fused op: the same for real and fake tensors."""

from __future__ import annotations

from torch import Tensor

from flashcore_ops.checks import (
    check_cache_memory,
    check_caches,
    check_no_gradients,
    check_options,
    check_query,
    check_range_and_sinks,
    check_small,
    check_tensors,
)
from flashcore_ops.errors import DeviceError, LayoutError, ShapeError


def check_rope_append_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    kv_range: Tensor,
    scale: float | None,
    window: int,
    softcap: float,
    sinks: Tensor | None,
    num_splits: int,
    next_weight: Tensor | None,
) -> None:
    """Raises a typed error unless `rope_append_attention` can serve these arguments."""
    check_no_gradients(query, key, value, cos, sin, key_cache, value_cache, sinks)
    names = ("query", "key", "value", "key_cache", "value_cache")
    check_tensors(query, key, value, key_cache, value_cache, names=names)
    check_caches(key, value, key_cache, value_cache)
    check_query(query, key)
    for tensor, name in ((query, "query"), (key, "key")):
        if tensor.shape[2] != 1:
            raise ShapeError.explain(
                name,
                expected="one token a row",
                got=f"{tensor.shape[2]}",
                fix="Rotate several tokens yourself, append them with append_kv_ and call attention.",
            )
    _check_rotation(cos, "cos", query)
    _check_rotation(sin, "sin", query)
    check_range_and_sinks(query, kv_range, sinks, num_ranges=query.shape[0])
    check_options(scale, is_causal=True, window=window, softcap=softcap, num_splits=num_splits)
    read = {"query": query, "key": key, "value": value, "cos": cos, "sin": sin}
    check_cache_memory(key_cache, value_cache, read)
    if next_weight is not None:
        _check_next_weight(next_weight, query)


def _check_next_weight(next_weight: Tensor, query: Tensor) -> None:
    if next_weight.device != query.device:
        raise DeviceError.explain(
            "next_weight",
            expected=f"query's device {query.device}",
            got=f"{next_weight.device}",
            fix="Move it with .to(query.device), or leave it out.",
        )
    if not next_weight.is_contiguous():
        raise LayoutError.explain(
            "next_weight",
            expected="a contiguous tensor",
            got=f"strides {list(next_weight.stride())}",
            fix="Call .contiguous() on it, or leave it out.",
        )


def _check_rotation(tensor: Tensor, name: str, query: Tensor) -> None:
    is_shared = tensor.dim() > 0 and tensor.shape[0] == 1
    shape = (1 if is_shared else query.shape[0], 1, query.shape[3])
    check_small(tensor, name, shape=shape, dtypes=(query.dtype,), device=query.device, like="query")
    if tensor.stride(2) != 1:
        raise LayoutError.explain(
            name,
            expected="a contiguous last dim (stride 1)",
            got=f"stride {tensor.stride(2)}",
            fix="Call .contiguous() on it first.",
        )
