"""Append: new keys and values into consecutive slots of each row's static cache."""

import torch
import triton
import triton.language as tl

from csrc_free_kernels.launch import Launcher
from csrc_free_kernels.tuning import next_power_of_2


@Launcher
@triton.jit(do_not_specialize=["Hkv", "T", "S"])
def _append_kernel(
    p_key_cache,
    p_value_cache,
    p_key,
    p_value,
    p_positions,
    stride_key_cache,
    stride_value_cache,
    stride_key,
    stride_value,
    stride_positions,
    Hkv,
    T,
    S,
    D: tl.constexpr,
    Dv: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """One program copies one token of one head; a slot outside [0, S) is not written."""
    i_h = (tl.program_id(0) % Hkv).to(tl.int64)
    i_t = (tl.program_id(0) // Hkv % T).to(tl.int64)
    i_b = (tl.program_id(0) // Hkv // T).to(tl.int64)
    i_slot = tl.load(p_positions + i_b * stride_positions).to(tl.int64) + i_t
    if (i_slot >= 0) & (i_slot < S):
        o_d = tl.arange(0, BLOCK_D)
        o_dv = tl.arange(0, BLOCK_DV)
        p_k = p_key + i_b * stride_key[0] + i_h * stride_key[1] + i_t * stride_key[2]
        p_v = p_value + i_b * stride_value[0] + i_h * stride_value[1] + i_t * stride_value[2]
        p_k_slot = p_key_cache + i_b * stride_key_cache[0] + i_h * stride_key_cache[1] + i_slot * stride_key_cache[2]
        p_v_slot = p_value_cache + i_b * stride_value_cache[0] + i_h * stride_value_cache[1]
        p_v_slot = p_v_slot + i_slot * stride_value_cache[2]
        tl.store(p_k_slot + o_d, tl.load(p_k + o_d, mask=o_d < D), mask=o_d < D)
        tl.store(p_v_slot + o_dv, tl.load(p_v + o_dv, mask=o_dv < Dv), mask=o_dv < Dv)


def append_kv_(
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    positions: torch.Tensor,
) -> None:
    """Writes key and value `[B, Hkv, T, D or Dv]` into slots `positions[b] + t` of the caches; B, Hkv, T > 0."""
    batch, num_kv_heads, num_tokens, head_dim = key.shape
    value_dim = value.shape[3]
    _append_kernel(
        (batch * num_kv_heads * num_tokens,),
        key_cache,
        value_cache,
        key,
        value,
        positions,
        key_cache.stride()[:3],
        value_cache.stride()[:3],
        key.stride()[:3],
        value.stride()[:3],
        positions.stride(0),
        num_kv_heads,
        num_tokens,
        key_cache.shape[2],
        D=head_dim,
        Dv=value_dim,
        BLOCK_D=next_power_of_2(head_dim),
        BLOCK_DV=next_power_of_2(value_dim),
        num_warps=1,
    )
