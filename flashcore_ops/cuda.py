"""CUDA kernels of the ops: which Triton kernel serves which shape."""

from __future__ import annotations

import torch
from torch import Tensor

from csrc_free_kernels import argmax as argmax_kernels
from csrc_free_kernels import decode, decode_tuning, kv_append, linear_tuning, prefill, rope_decode, shares, tuning
from csrc_free_kernels import linear as linear_kernels
from csrc_free_kernels import step_input as step_input_kernels
from csrc_free_kernels.decode_tuning import DecodePlan
from csrc_free_kernels.tuning import HopperTiles, Tiles


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
    """Writes attention's result `[B, Hq, Q, Dv]` into output, and `[B, Hq, Q]` into lse if given."""
    query_len = query.shape[2]
    if query.shape[0] == 0 or query_len == 0:
        return
    # A window of all slots hides none; a larger one could overflow the kernels' int32.
    window = min(window, max(key.shape[2], 1))
    sinks = None if sinks is None else sinks.contiguous()
    # Triton launches on the current device.
    with torch.cuda.device(query.device):
        if query_len > decode_tuning.MAX_DECODE_TOKENS or cu_seqlens_q is not None:
            prefill.prefill_attention(
                query,
                key,
                value,
                output,
                lse,
                kv_range=kv_range,
                sinks=sinks,
                scale=scale,
                is_causal=is_causal,
                window=window,
                softcap=softcap,
                cu_seqlens=None if cu_seqlens_q is None else cu_seqlens_q.contiguous(),
                tiles=_prefill_tiles(query, key, value, scale, softcap, cu_seqlens_q),
                section_heads=section_heads(query, key, value),
            )
            return
        decode.decode_attention(
            query,
            key,
            value,
            output,
            lse,
            kv_range=kv_range,
            sinks=sinks,
            scale=scale,
            is_causal=is_causal,
            window=window,
            softcap=softcap,
            plan=_plan_decode(query, key, value, scale, softcap, num_splits),
            is_dependent=tuning.supports_dependent_launch(tuning.architecture(query.device)),
        )


def _prefill_tiles(
    query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float, cu_seqlens_q: Tensor | None
) -> Tiles | HopperTiles:
    arch, head_dim = tuning.architecture(query.device), max(query.shape[3], value.shape[3])
    if tuning.is_hopper(arch) and prefill.is_served_by_hopper(query, key, value, scale, softcap, cu_seqlens_q):
        return tuning.hopper_prefill_tiles(head_dim, tuning.num_multiprocessors(query.device))
    return tuning.prefill_tiles(arch, query.dtype, head_dim)


def section_heads(query: Tensor, key: Tensor, value: Tensor) -> int:
    """Heads that prefill computes at a time."""
    batch, num_kv_heads, kv_len, head_dim = key.shape
    return tuning.section_heads(
        tuning.architecture(query.device),
        num_kv_heads=batch * num_kv_heads,
        group=query.shape[1] // num_kv_heads,
        head_bytes=kv_len * (head_dim + value.shape[3]) * key.itemsize,
    )


def append_kv_(key_cache: Tensor, value_cache: Tensor, key: Tensor, value: Tensor, positions: Tensor) -> None:
    """Writes each row's new tokens into its cache, from slot `positions[b]`."""
    if key.shape[0] == 0 or key.shape[1] == 0 or key.shape[2] == 0:
        return
    with torch.cuda.device(key.device):
        kv_append.append_kv_(key_cache, value_cache, key, value, positions)
    _increment_versions(key_cache, value_cache)


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
    """Rotates and appends one new token a row, and writes attention's result `[B, Hq, 1, Dv]` into output."""
    if query.shape[0] == 0:
        return
    kv_len = key_cache.shape[2]
    if kv_len == 0:
        output.fill_(torch.nan)
        return
    with torch.cuda.device(query.device):
        rope_decode.rope_append_attention(
            query,
            key,
            value,
            cos,
            sin,
            key_cache,
            value_cache,
            output,
            kv_range=kv_range,
            sinks=None if sinks is None else sinks.contiguous(),
            scale=scale,
            window=min(window, kv_len),
            softcap=softcap,
            next_weight=next_weight,
            plan=_plan_decode(query, key_cache, value_cache, scale, softcap, num_splits),
            is_dependent=tuning.supports_dependent_launch(tuning.architecture(query.device)),
        )
    _increment_versions(key_cache, value_cache)


def _plan_decode(
    query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float, num_splits: int
) -> DecodePlan:
    batch, num_query_heads, query_len, head_dim = query.shape
    _, num_kv_heads, kv_len, _ = key.shape
    arch = tuning.architecture(query.device)
    return decode_tuning.plan_decode(
        *(arch, query.dtype, max(head_dim, value.shape[3])),
        num_rows=num_query_heads // num_kv_heads * query_len,
        num_heads=batch * num_kv_heads,
        kv_len=kv_len,
        num_multiprocessors=tuning.num_multiprocessors(query.device),
        num_splits=num_splits,
        has_ring=tuning.is_hopper(arch) and shares.is_served_by_ring(query, key, value, scale, softcap),
    )


def _increment_versions(*caches: Tensor) -> None:
    """Tells autograd of a write behind its back; inference tensors have no version counter."""
    for cache in caches:
        if not cache.is_inference():
            torch.autograd.graph.increment_version(cache)


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
    rows = input.reshape(-1, input.shape[-1]).contiguous()
    if rows.shape[0] == 0:
        return
    arch = tuning.architecture(input.device)
    with torch.cuda.device(input.device):
        linear_kernels.linear(
            rows,
            weights,
            output.view(-1, output.shape[-1]),
            norm_weight=norm_weight,
            eps=eps,
            residual=None if residual is None else residual.reshape(-1, output.shape[-1]).contiguous(),
            is_gated=is_gated,
            has_constant_weights=has_constant_weights,
            tiles=linear_tuning.linear_tiles(
                arch,
                rows.dtype,
                num_rows=rows.shape[0],
                num_columns=output.shape[-1] * (2 if is_gated else 1),
                depth=rows.shape[1],
                num_multiprocessors=tuning.num_multiprocessors(input.device),
                # One row does not ask.
                is_aligned=rows.shape[0] > 1 and linear_kernels.is_aligned(rows, weights),
            ),
            is_dependent=tuning.supports_dependent_launch(arch),
        )


def step_input(
    tokens: Tensor,
    start: Tensor,
    position_offset: Tensor,
    length: Tensor,
    *,
    embedding: Tensor,
    inv_freq: Tensor,
    attention_scaling: float,
    hidden: Tensor,
    cos: Tensor,
    sin: Tensor,
    kv_range: Tensor,
) -> None:
    """Writes hidden `[B, 1, K]`, cos and sin `[B, 1, D]` and kv_range `[B, 2]` of tokens `[B, 1]` at slot `length`."""
    arch = tuning.architecture(tokens.device)
    with torch.cuda.device(tokens.device):
        step_input_kernels.step_input(
            *(tokens, start, position_offset, length),
            embedding=embedding,
            inv_freq=inv_freq,
            attention_scaling=attention_scaling,
            hidden=hidden,
            cos=cos,
            sin=sin,
            kv_range=kv_range,
            is_dependent=tuning.supports_dependent_launch(arch),
        )


def argmax(logits: Tensor, tokens: Tensor) -> None:
    """Writes the first index of each row's largest number of `[B, V]` into tokens, contiguous int64 `[B, 1]`."""
    if logits.shape[0] == 0:
        return
    with torch.cuda.device(logits.device):
        is_dependent = tuning.supports_dependent_launch(tuning.architecture(logits.device))
        argmax_kernels.argmax(logits, tokens, is_dependent=is_dependent)
