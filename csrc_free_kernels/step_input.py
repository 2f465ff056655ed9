"""What a decode step begins with, in one launch: the tokens' embeddings, their rotations and the visible slots."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from csrc_free_kernels import dependent_launch
from csrc_free_kernels.launch import Launcher
from csrc_free_kernels.tuning import next_power_of_2


@Launcher
@triton.jit(do_not_specialize=["V"])
def _step_input_kernel(
    p_tokens,
    p_start,
    p_position_offset,
    p_length,
    p_embedding,
    p_inv_freq,
    p_hidden,
    p_cos,
    p_sin,
    p_range,
    attention_scaling,
    V,
    K: tl.constexpr,
    HALF_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
):
    dependent_launch.launch_dependents(IS_DEPENDENT)
    dependent_launch.wait(IS_DEPENDENT)
    i_b = tl.program_id(0).to(tl.int64)
    token = tl.load(p_tokens + i_b)
    length = tl.load(p_length)
    tl.store(p_range + 2 * i_b, tl.load(p_start + i_b))
    tl.store(p_range + 2 * i_b + 1, (length + 1).to(tl.int32))

    o_k = tl.arange(0, BLOCK_K)
    m_k = o_k < K
    # A token outside the vocabulary has no row to read: NaN shows in the logits.
    is_known = (token >= 0) & (token < V)
    b_row = tl.load(p_embedding + token * K + o_k, mask=m_k & is_known, other=float("nan"))
    tl.store(p_hidden + i_b * K + o_k, b_row, mask=m_k)

    position = (length - tl.load(p_position_offset + i_b)).to(tl.float32)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < HALF_D
    b_angle = tl.load(p_inv_freq + o_d, mask=m_d, other=0.0) * position
    b_cos = (tl.cos(b_angle) * attention_scaling).to(p_cos.dtype.element_ty)
    b_sin = (tl.sin(b_angle) * attention_scaling).to(p_sin.dtype.element_ty)
    o_row = i_b * 2 * HALF_D + o_d
    tl.store(p_cos + o_row, b_cos, mask=m_d)
    tl.store(p_cos + o_row + HALF_D, b_cos, mask=m_d)
    tl.store(p_sin + o_row, b_sin, mask=m_d)
    tl.store(p_sin + o_row + HALF_D, b_sin, mask=m_d)


def step_input(
    tokens: torch.Tensor,
    start: torch.Tensor,
    position_offset: torch.Tensor,
    length: torch.Tensor,
    *,
    embedding: torch.Tensor,
    inv_freq: torch.Tensor,
    attention_scaling: float,
    hidden: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    kv_range: torch.Tensor,
    is_dependent: bool,
) -> None:
    """Writes hidden `[B, 1, K]`, cos and sin `[B, 1, D]` and kv_range `[B, 2]` of tokens at slot `length`.

    All contiguous. tokens, start and position_offset hold B numbers, length one; embedding is `[V, K]`, inv_freq
    `[D / 2]` in float32.
    """
    depth, num_frequencies = embedding.shape[1], inv_freq.shape[0]
    _step_input_kernel(
        (tokens.shape[0],),
        tokens,
        start,
        position_offset,
        length,
        embedding,
        inv_freq,
        hidden,
        cos,
        sin,
        kv_range,
        attention_scaling,
        embedding.shape[0],
        K=depth,
        HALF_D=num_frequencies,
        BLOCK_K=next_power_of_2(depth),
        BLOCK_D=next_power_of_2(num_frequencies),
        IS_DEPENDENT=is_dependent,
        num_warps=8,
        **dependent_launch.launch_options(is_dependent),
    )
