"""Argument checks of the ops: the same for real and fake tensors, none of them reads a tensor's values."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flashcore_ops.errors import DeviceError, DtypeError, GradientError, LayoutError, OptionError, ShapeError

SUPPORTED_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MIN_HEAD_DIM, MAX_HEAD_DIM, HEAD_DIM_STEP = 16, 256, 8
HEAD_DIM_RULE = f"a multiple of {HEAD_DIM_STEP} from {MIN_HEAD_DIM} to {MAX_HEAD_DIM}"
# What scores may be multiplied by and still stay inside float32. Any larger scale only picks the largest score.
LARGEST_FACTOR = 2.0**100


def is_supported_head_dim(head_dim: int) -> bool:
    """Whether the kernels serve this head dim.

    Example:
        >>> [is_supported_head_dim(d) for d in (8, 64, 80, 100, 264)]
        [False, True, True, False, False]
    """
    return MIN_HEAD_DIM <= head_dim <= MAX_HEAD_DIM and head_dim % HEAD_DIM_STEP == 0


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype without its module.

    Example:
        >>> dtype_name(torch.bfloat16)
        'bfloat16'
    """
    return str(dtype).removeprefix("torch.")


def check_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kv_range: Tensor | None,
    scale: float | None,
    is_causal: bool,
    window: int,
    softcap: float,
    sinks: Tensor | None,
    num_splits: int,
    cu_seqlens_q: Tensor | None,
) -> None:
    """Raises a typed error unless the attention ops can serve these arguments."""
    check_no_gradients(query, key, value, sinks)
    check_tensors(query, key, value, names=("query", "key", "value"))
    _check_pairs(key, value, names=("key", "value"))
    check_query(query, key)
    if cu_seqlens_q is not None:
        check_sequences(query, key, kv_range, cu_seqlens_q)
    num_ranges = query.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
    check_range_and_sinks(query, kv_range, sinks, num_ranges)
    check_options(scale, is_causal, window, softcap, num_splits)


def check_append_kv(key_cache: Tensor, value_cache: Tensor, key: Tensor, value: Tensor, positions: Tensor) -> None:
    """Raises a typed error unless `append_kv_` can serve these arguments."""
    check_no_gradients(key_cache, value_cache, key, value)
    check_tensors(key, value, key_cache, value_cache, names=("key", "value", "key_cache", "value_cache"))
    check_caches(key, value, key_cache, value_cache)
    dtypes = (torch.int32, torch.int64)
    check_small(positions, "positions", shape=(key.shape[0],), dtypes=dtypes, device=key.device, like="key")
    check_cache_memory(key_cache, value_cache, read={"key": key, "value": value})


def check_query(query: Tensor, key: Tensor) -> None:
    """Raises ShapeError unless query has key's head dim and a multiple of its heads."""
    if query.shape[3] != key.shape[3]:
        raise ShapeError.explain(
            "key",
            expected=f"query's head dim {query.shape[3]}",
            got=f"{key.shape[3]}",
            fix="Project query and key to the same head dim.",
        )
    if query.shape[1] == 0 or key.shape[1] == 0 or query.shape[1] % key.shape[1] != 0:
        raise ShapeError.explain(
            "query",
            expected=f"a number of heads that is a multiple of key's {key.shape[1]}",
            got=f"{query.shape[1]}",
            fix="Pass query as [B, Hq, Q, D] and key as [B, Hkv, S, D] with Hq = group * Hkv.",
        )


def check_sequences(query: Tensor, key: Tensor, kv_range: Tensor | None, cu_seqlens_q: Tensor) -> None:
    """Raises a typed error unless cu_seqlens_q is int32 `[N + 1]` and divides the rows of a batch of one."""
    if cu_seqlens_q.dim() != 1 or cu_seqlens_q.shape[0] == 0:
        raise ShapeError.explain(
            "cu_seqlens_q",
            expected="shape [N + 1] for N sequences",
            got=f"{list(cu_seqlens_q.shape)}",
            fix="Pass each sequence's first row, and the end of the last.",
        )
    shape = (cu_seqlens_q.shape[0],)
    check_small(cu_seqlens_q, "cu_seqlens_q", shape=shape, dtypes=(torch.int32,), device=query.device, like="query")
    if query.shape[0] != 1:
        raise ShapeError.explain(
            "query",
            expected="a batch of 1 beside cu_seqlens_q",
            got=f"{query.shape[0]}",
            fix="Pack the sequences one behind the other, as [1, Hq, T, D].",
        )
    if kv_range is None and key.shape[2] != query.shape[2]:
        raise ShapeError.explain(
            "key",
            expected=f"query's {query.shape[2]} tokens beside cu_seqlens_q without kv_range",
            got=f"{key.shape[2]}",
            fix="Pass kv_range, the slots (start, end) of each sequence.",
        )


def check_range_and_sinks(query: Tensor, kv_range: Tensor | None, sinks: Tensor | None, num_ranges: int) -> None:
    """Raises a typed error unless kv_range is int32 `[num_ranges, 2]` and sinks `[Hq]`, beside query."""
    if kv_range is not None:
        shape = (num_ranges, 2)
        check_small(kv_range, "kv_range", shape=shape, dtypes=(torch.int32,), device=query.device, like="query")
    if sinks is not None:
        dtypes = (query.dtype, torch.float32)
        check_small(sinks, "sinks", shape=(query.shape[1],), dtypes=dtypes, device=query.device, like="query")


def check_caches(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor) -> None:
    """Raises ShapeError unless the caches pair up, and new keys and values fit them."""
    _check_pairs(key_cache, value_cache, names=("key_cache", "value_cache"))
    for tokens, cache, name in ((key, key_cache, "key"), (value, value_cache, "value")):
        if tokens.shape[1] != cache.shape[1] or tokens.shape[3] != cache.shape[3]:
            raise ShapeError.explain(
                name,
                expected=f"the {cache.shape[1]} heads and head dim {cache.shape[3]} of {name}_cache",
                got=f"{tokens.shape[1]} heads and head dim {tokens.shape[3]}",
                fix=f"Pass {name} as [B, Hkv, T, D] with its cache's Hkv and D.",
            )
    if key.shape[2] != value.shape[2]:
        raise ShapeError.explain(
            "value",
            expected=f"the {key.shape[2]} tokens of key",
            got=f"{value.shape[2]}",
            fix="Pass as many new values as new keys.",
        )


def check_cache_memory(key_cache: Tensor, value_cache: Tensor, read: dict[str, Tensor]) -> None:
    """Raises LayoutError if a cache, which is written, shares memory with itself, the other, or what is read."""
    _check_apart(key_cache, value_cache, "key_cache", "value_cache")
    for cache, cache_name in ((key_cache, "key_cache"), (value_cache, "value_cache")):
        if _overlaps_itself(cache):
            raise LayoutError.explain(
                cache_name,
                expected="every slot to have memory of its own",
                got=f"strides {list(cache.stride())} for sizes {list(cache.shape)}",
                fix="Allocate the cache with torch.empty or torch.zeros.",
            )
        for name, tensor in read.items():
            _check_apart(cache, tensor, cache_name, name)


def check_no_gradients(*tensors: Tensor | None) -> None:
    """Raises GradientError if grad mode is on and one of the tensors requires grad."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise GradientError.explain(
            "flashcore",
            expected="no gradients, since its ops are inference-only",
            got="an input that requires grad while grad mode is on",
            fix="Call under torch.no_grad(), or detach the inputs.",
        )


def check_tensors(*tensors: Tensor, names: tuple[str, ...]) -> None:
    """Rank, dtype, device, batch, head dim and layout of `[B, H, T, D]` tensors that go together."""
    first = tensors[0]
    for tensor, name in zip(tensors, names, strict=True):
        if tensor.dim() != 4:
            raise ShapeError.explain(
                name,
                expected="4 dims [batch, heads, tokens, head_dim]",
                got=f"{tensor.dim()} dims {list(tensor.shape)}",
                fix="Unsqueeze the missing dims, or use attention_with_kv_cache for [B, T, H*D].",
            )
        if tensor.dtype not in SUPPORTED_DTYPES:
            raise DtypeError.explain(
                name,
                expected="float16, bfloat16 or float32",
                got=dtype_name(tensor.dtype),
                fix="Cast it with .to(dtype).",
            )
        if tensor.dtype != first.dtype:
            raise DtypeError.explain(
                name,
                expected=f"{names[0]}'s dtype {dtype_name(first.dtype)}",
                got=dtype_name(tensor.dtype),
                fix=f"Cast it with .to({names[0]}.dtype).",
            )
        if tensor.device != first.device:
            raise DeviceError.explain(
                name,
                expected=f"{names[0]}'s device {first.device}",
                got=f"{tensor.device}",
                fix=f"Move it with .to({names[0]}.device).",
            )
        if tensor.shape[0] != first.shape[0]:
            raise ShapeError.explain(
                name,
                expected=f"{names[0]}'s batch {first.shape[0]}",
                got=f"{tensor.shape[0]}",
                fix="Pass the same batch for all; expand() a shared one.",
            )
        if not is_supported_head_dim(tensor.shape[3]):
            raise ShapeError.explain(
                name,
                expected=f"a head dim that is {HEAD_DIM_RULE}",
                got=f"{tensor.shape[3]}",
                fix="Pad the head dim with zeros and pass the unpadded scale.",
            )
        if tensor.stride(3) != 1:
            raise LayoutError.explain(
                name,
                expected="a contiguous last dim (stride 1)",
                got=f"stride {tensor.stride(3)}",
                fix="Call .contiguous() on it first.",
            )


def _check_pairs(key: Tensor, value: Tensor, names: tuple[str, str]) -> None:
    if value.shape[1] != key.shape[1] or value.shape[2] != key.shape[2]:
        raise ShapeError.explain(
            names[1],
            expected=f"{names[0]}'s {key.shape[1]} heads and {key.shape[2]} slots",
            got=f"{value.shape[1]} heads and {value.shape[2]} slots",
            fix="Keys and values come in pairs: pass one value for each key.",
        )


def check_small(
    tensor: Tensor,
    name: str,
    shape: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
    like: str,
) -> None:
    """Shape, dtype and device of a tensor that goes beside another, named by like."""
    if tensor.dim() != len(shape) or any(a != b for a, b in zip(tensor.shape, shape, strict=True)):
        raise ShapeError.explain(
            name, expected=f"shape {list(shape)}", got=f"{list(tensor.shape)}", fix=f"Pass {name} as {list(shape)}."
        )
    if tensor.dtype not in dtypes:
        names = " or ".join(dict.fromkeys(dtype_name(dtype) for dtype in dtypes))
        raise DtypeError.explain(name, expected=names, got=dtype_name(tensor.dtype), fix="Cast it with .to(dtype).")
    if tensor.device != device:
        raise DeviceError.explain(
            name,
            expected=f"{like}'s device {device}",
            got=f"{tensor.device}",
            fix=f"Create it on {like}'s device: the kernels read it there.",
        )


def check_options(scale: float | None, is_causal: bool, window: int, softcap: float, num_splits: int) -> None:
    """Raises OptionError if a scalar is out of range or two exclude each other."""
    if scale is not None and not math.isfinite(scale):
        raise OptionError.explain(
            "scale", expected="a finite number", got=f"{scale}", fix="Pass None for head_dim ** -0.5."
        )
    if not 0 <= softcap <= LARGEST_FACTOR:
        raise OptionError.explain(
            "softcap", expected="a number from 0 to 2**100", got=f"{softcap}", fix="Pass 0.0 for no softcap."
        )
    if window < 0:
        raise OptionError.explain("window", expected="an int >= 0", got=f"{window}", fix="Pass 0 for no window.")
    if window > 0 and not is_causal:
        raise OptionError.explain(
            "window",
            expected="0 with is_causal=False",
            got=f"{window}",
            fix="A window counts back from the row's own column: pass is_causal=True, or window=0.",
        )
    if num_splits < 0:
        raise OptionError.explain(
            "num_splits", expected="an int >= 0", got=f"{num_splits}", fix="Pass 0 to let FlashCore choose."
        )


def _check_apart(a: Tensor, b: Tensor, a_name: str, b_name: str) -> None:
    if a.numel() == 0 or b.numel() == 0 or not torch._C._is_alias_of(a, b):  # type: ignore[attr-defined]
        return
    a_first, b_first = a.storage_offset(), b.storage_offset()
    if a_first <= _last_element(b) and b_first <= _last_element(a):
        raise LayoutError.explain(
            b_name,
            expected=f"memory apart from {a_name}'s",
            got=f"a view whose memory range overlaps {a_name}'s",
            fix="Allocate keys and values separately, and clone what comes out of a cache.",
        )


def _overlaps_itself(tensor: Tensor) -> bool:
    """Whether two elements may share memory, as in an expanded tensor."""
    extent = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= extent:
                return True
            extent += (size - 1) * stride
    return False


def _last_element(tensor: Tensor) -> int:
    """Offset of the tensor's last element in its storage."""
    last = int(tensor.storage_offset())
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        last += (size - 1) * stride
    return last
