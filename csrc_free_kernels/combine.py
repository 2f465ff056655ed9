"""Combine: the partial results of split-KV kernels, added up in a fixed order, so that results repeat bitwise."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from csrc_free_kernels import dependent_launch, replay, softmax
from csrc_free_kernels.launch import Launcher
from csrc_free_kernels.tuning import ceil_div, next_power_of_2

_NUMBERS_PER_PROGRAM = 256


def allocate_partials(output: torch.Tensor, num_splits: int) -> torch.Tensor:
    """Room for what each split leaves of each row (batch, head, token) of an output `[B, Hq, Q, Dv]`, in float32.

    `[num_splits, B * Hq * Q, Dv]` unnormalised outputs, then as many maxima and as many sums: a log-sum-exp would round
    away what the combination needs.
    """
    num_elements = num_splits * output.shape[:3].numel() * (output.shape[3] + 2)
    return replay.allocate((num_elements,), (1,), torch.float32, output.device)


@triton.jit
def maxima_and_sums(p_partial, num_splits, num_rows, Dv: tl.constexpr):
    """Where the maxima and the sums begin."""
    num_parts = tl.cast(num_splits, tl.int64) * num_rows
    return p_partial + num_parts * Dv, p_partial + num_parts * (Dv + 1)


@triton.jit
def store_partial(p_partial, num_splits, num_rows, i_part, b_o, b_max, b_sum, m_row, Dv: tl.constexpr):
    """Leaves b_o [BLOCK_M, BLOCK_DV] and its max and sum at rows i_part [BLOCK_M] of the partials."""
    p_partial_max, p_partial_sum = maxima_and_sums(p_partial, num_splits, num_rows, Dv)
    o_dv = tl.arange(0, b_o.shape[1])
    tl.store(p_partial + i_part[:, None] * Dv + o_dv[None, :], b_o, mask=m_row[:, None] & (o_dv < Dv)[None, :])
    tl.store(p_partial_max + i_part, b_max, mask=m_row)
    tl.store(p_partial_sum + i_part, b_sum, mask=m_row)


@Launcher
@triton.jit(do_not_specialize=["Hq", "Q", "num_splits", "num_rows"])
def _combine_kernel(
    p_output,
    p_lse,
    p_partial,
    p_sinks,
    stride_output,
    to_log2,
    to_natural,
    Hq,
    Q,
    num_splits,
    num_rows,
    Dv: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
):
    """Some columns of one row (batch, head, token): the splits' sums, at a common maximum, added in order."""
    dependent_launch.launch_dependents(IS_DEPENDENT)
    dependent_launch.wait(IS_DEPENDENT)
    i_row = tl.program_id(0).to(tl.int64)
    i_token = i_row % Q
    i_head = i_row // Q % Hq
    i_b = i_row // Q // Hq
    o_split = tl.arange(0, BLOCK_SPLITS)
    m_split = o_split < num_splits
    o_part = o_split.to(tl.int64) * num_rows + i_row
    o_dv = tl.program_id(1) * BLOCK_DV + tl.arange(0, BLOCK_DV)
    m_dv = o_dv < Dv
    p_partial_max, p_partial_sum = maxima_and_sums(p_partial, num_splits, num_rows, Dv)
    b_part_max = tl.load(p_partial_max + o_part, mask=m_split, other=float("-inf"))
    b_part_sum = tl.load(p_partial_sum + o_part, mask=m_split, other=0.0)
    # [BLOCK_SPLITS, BLOCK_DV]
    m_part = m_split[:, None] & m_dv[None, :]
    b_part = tl.load(p_partial + o_part[:, None] * Dv + o_dv[None, :], mask=m_part, other=0.0)

    b_max = tl.max(b_part_max, 0)
    b_decay = tl.exp2((b_part_max - softmax.finite(b_max)) * to_log2)
    b_sum = tl.sum(b_part_sum * b_decay, 0)
    b_o = tl.sum(b_part * b_decay[:, None], 0)

    o_one = tl.zeros([1], dtype=tl.int64)
    b_sink = softmax.load_sinks(p_sinks, i_head + o_one, o_one == 0)
    b_one_max = tl.zeros([1], dtype=tl.float32) + b_max
    b_one_sum = tl.zeros([1], dtype=tl.float32) + b_sum
    b_out, b_lse = softmax.finish(b_o[None, :], b_one_max, b_one_sum, b_sink, to_natural)
    p_o = p_output + i_b * stride_output[0] + i_head * stride_output[1] + i_token * stride_output[2]
    tl.store(p_o + o_dv[None, :], b_out.to(p_output.dtype.element_ty), mask=m_dv[None, :])
    if p_lse is not None:
        tl.store(p_lse + i_row + o_one, b_lse, mask=(o_one + tl.program_id(1)) == 0)


def combine_splits(
    partials: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor | None,
    *,
    num_splits: int,
    sinks: torch.Tensor | None,
    scores: softmax.ScoreScale,
    is_dependent: bool,
) -> None:
    """Writes attention into output `[B, Hq, Q, Dv]` and, if given, lse (contiguous `[B, Hq, Q]`)."""
    num_rows, value_dim = output.shape[:3].numel(), output.shape[3]
    block_splits = next_power_of_2(num_splits)
    # Few numbers a program, all loaded at once: one trip to memory. Yet with few splits there are rows enough.
    block_dv = min(max(32, _NUMBERS_PER_PROGRAM // block_splits), next_power_of_2(value_dim))
    _combine_kernel(
        (num_rows, ceil_div(value_dim, block_dv)),
        output,
        lse,
        partials,
        sinks,
        output.stride()[:3],
        scores.to_log2,
        scores.to_natural,
        output.shape[1],
        output.shape[2],
        num_splits,
        num_rows,
        Dv=value_dim,
        BLOCK_DV=block_dv,
        BLOCK_SPLITS=block_splits,
        IS_DEPENDENT=is_dependent,
        num_warps=2,
        **dependent_launch.launch_options(is_dependent),
    )
