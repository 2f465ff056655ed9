"""The whole `torch.ops.flashcore` surface: schemas, kernels for CPU and CUDA, fake kernels, and the gradient guard.

The low-level Library is used because its ops cost about half of a `custom_op` per eager call. Each op is one function
around an exchangeable kernel, so that real and fake calls check, allocate and stride alike.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from csrc_free_kernels import replay
from flashcore_ops import cpu
from flashcore_ops.checks import LARGEST_FACTOR, check_append_kv, check_attention
from flashcore_ops.errors import MissingDependencyError
from flashcore_ops.linear_checks import check_linear
from flashcore_ops.rope_checks import check_rope_append_attention

Kernel = Callable[..., None]

_ATTENTION_ARGUMENTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? kv_range=None, float? scale=None, bool is_causal=True, "
    "int window=0, float softcap=0.0, Tensor? sinks=None, int num_splits=0, Tensor? cu_seqlens_q=None"
)


def _attention(kernel: Kernel) -> Callable[..., Tensor]:
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
        options = (is_causal, window, softcap, sinks, num_splits, cu_seqlens_q)
        check_attention(query, key, value, kv_range, scale, *options)
        output = _allocate_output(query, value)
        kernel(query, key, value, kv_range, _effective_scale(scale, query), *options, output, None)
        return output

    return attention


def _attention_with_lse(kernel: Kernel) -> Callable[..., tuple[Tensor, Tensor]]:
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
        options = (is_causal, window, softcap, sinks, num_splits, cu_seqlens_q)
        check_attention(query, key, value, kv_range, scale, *options)
        output = _allocate_output(query, value)
        lse = _allocate_lse(query)
        kernel(query, key, value, kv_range, _effective_scale(scale, query), *options, output, lse)
        return output, lse

    return attention_with_lse


def _append_kv_(kernel: Kernel) -> Callable[..., None]:
    def append_kv_(key_cache: Tensor, value_cache: Tensor, key: Tensor, value: Tensor, positions: Tensor) -> None:
        check_append_kv(key_cache, value_cache, key, value, positions)
        kernel(key_cache, value_cache, key, value, positions)

    return append_kv_


def _rope_append_attention(kernel: Kernel) -> Callable[..., Tensor]:
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
        tensors = (query, key, value, cos, sin, key_cache, value_cache, kv_range)
        check_rope_append_attention(*tensors, scale, window, softcap, sinks, num_splits, next_weight)
        output = _allocate_output(query, value)
        kernel(*tensors, _effective_scale(scale, query), window, softcap, sinks, num_splits, next_weight, output)
        return output

    return rope_append_attention


def _linear(kernel: Kernel) -> Callable[..., Tensor]:
    def linear(
        input: Tensor,
        weights: list[Tensor],
        norm_weight: Tensor | None = None,
        eps: float = 1e-6,
        residual: Tensor | None = None,
        is_gated: bool = False,
        has_constant_weights: bool = False,
    ) -> Tensor:
        check_linear(input, weights, norm_weight, eps, residual, is_gated)
        width = weights[0].shape[0] if is_gated else sum(weight.shape[0] for weight in weights)
        output = input.new_empty((*input.shape[:-1], width))
        kernel(input, weights, norm_weight, eps, residual, is_gated, has_constant_weights, output)
        return output

    return linear


def _allocate_output(query: Tensor, value: Tensor) -> Tensor:
    """`[B, Hq, Q, Dv]`, stored `[B, Q, Hq, Dv]` so that a model's transpose and reshape are free."""
    batch, num_query_heads, query_len, _ = query.shape
    value_dim = value.shape[3]
    row = num_query_heads * value_dim
    stride = (query_len * row, value_dim, row, 1)
    return replay.allocate((batch, num_query_heads, query_len, value_dim), stride, query.dtype, query.device)


def _allocate_lse(query: Tensor) -> Tensor:
    batch, num_query_heads, query_len, _ = query.shape
    stride = (num_query_heads * query_len, query_len, 1)
    return replay.allocate((batch, num_query_heads, query_len), stride, torch.float32, query.device)


def _effective_scale(scale: float | None, query: Tensor) -> float:
    if scale is None:
        return query.shape[3] ** -0.5
    return min(max(scale, -LARGEST_FACTOR), LARGEST_FACTOR)


def _cuda_attention(*args: Any) -> None:
    _cuda_kernels().attention(*args)


def _cuda_append_kv_(*args: Any) -> None:
    _cuda_kernels().append_kv_(*args)


def _cuda_rope_append_attention(*args: Any) -> None:
    _cuda_kernels().rope_append_attention(*args)


def _cuda_linear(*args: Any) -> None:
    _cuda_kernels().linear(*args)


def _cuda_kernels() -> ModuleType:
    """flashcore_ops.cuda, imported at the first call: the package must import where there is no triton."""
    try:
        from flashcore_ops import cuda
    except ImportError as error:
        raise MissingDependencyError.explain(
            "flashcore", expected="triton, for tensors on a GPU", got=str(error), fix="Install triton 3.6."
        ) from error
    return cuda


def _no_kernel(*args: Any) -> None:
    """A fake call ends once its arguments are checked and its outputs allocated."""


OPS = (
    ("attention", f"({_ATTENTION_ARGUMENTS}) -> Tensor", _attention, cpu.attention, _cuda_attention),
    (
        "attention_with_lse",
        f"({_ATTENTION_ARGUMENTS}) -> (Tensor, Tensor)",
        _attention_with_lse,
        cpu.attention,
        _cuda_attention,
    ),
    (
        "append_kv_",
        "(Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor key, Tensor value, Tensor positions) -> ()",
        _append_kv_,
        cpu.append_kv_,
        _cuda_append_kv_,
    ),
    (
        "rope_append_attention",
        "(Tensor query, Tensor key, Tensor value, Tensor cos, Tensor sin, Tensor(a!) key_cache, "
        "Tensor(b!) value_cache, Tensor kv_range, float? scale=None, int window=0, float softcap=0.0, "
        "Tensor? sinks=None, int num_splits=0, Tensor? next_weight=None) -> Tensor",
        _rope_append_attention,
        cpu.rope_append_attention,
        _cuda_rope_append_attention,
    ),
    (
        "linear",
        "(Tensor input, Tensor[] weights, Tensor? norm_weight=None, float eps=1e-06, Tensor? residual=None, "
        "bool is_gated=False, bool has_constant_weights=False) -> Tensor",
        _linear,
        cpu.linear,
        _cuda_linear,
    ),
)

# On a GPU their calls repeat with the same shapes, layer after layer, and do nothing but allocate and launch.
_REPLAYED = {"attention", "attention_with_lse"}
_library = torch.library.Library("flashcore", "DEF")
for _name, _schema, _with_kernel, _cpu_kernel, _cuda_kernel in OPS:
    _library.define(_name + _schema, tags=(torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag))
    _library.impl(_name, _with_kernel(_cpu_kernel), "CPU")
    _on_gpu = _with_kernel(_cuda_kernel)
    _library.impl(_name, replay.Replayed(_on_gpu).__call__ if _name in _REPLAYED else _on_gpu, "CUDA")
    _library.impl(_name, torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_fake(f"flashcore::{_name}", _with_kernel(_no_kernel), lib=_library)
