"""The likeliest token of each row, in two launches: torch reduces a row of a whole vocabulary with few processors."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from csrc_free_kernels import dependent_launch
from csrc_free_kernels.launch import Launcher
from csrc_free_kernels.tuning import ceil_div, next_power_of_2

_CHUNK = 2048


@Launcher
@triton.jit(do_not_specialize=["V"])
def _chunk_kernel(
    p_logits, p_largest, p_index, stride_logits, V, CHUNK: tl.constexpr, IS_DEPENDENT: tl.constexpr
):  # fmt: skip
    dependent_launch.launch_dependents(IS_DEPENDENT)
    dependent_launch.wait(IS_DEPENDENT)
    i_chunk = tl.program_id(0)
    i_row = tl.program_id(1).to(tl.int64)
    o_v = i_chunk * CHUNK + tl.arange(0, CHUNK)
    b_x = tl.load(p_logits + i_row * stride_logits + o_v, mask=o_v < V, other=float("-inf")).to(tl.float32)
    # No comparison finds a NaN: it counts as infinite.
    b_x = tl.where(b_x == b_x, b_x, float("inf"))
    largest, index = tl.max(b_x, 0, return_indices=True, return_indices_tie_break_left=True)
    i_part = i_row * tl.num_programs(0) + i_chunk
    tl.store(p_largest + i_part, largest)
    tl.store(p_index + i_part, i_chunk * CHUNK + index)


@Launcher
@triton.jit(do_not_specialize=["num_chunks"])
def _row_kernel(
    p_largest, p_index, p_tokens, num_chunks, BLOCK_CHUNKS: tl.constexpr, IS_DEPENDENT: tl.constexpr
):  # fmt: skip
    dependent_launch.launch_dependents(IS_DEPENDENT)
    dependent_launch.wait(IS_DEPENDENT)
    i_row = tl.program_id(0).to(tl.int64)
    o_chunk = tl.arange(0, BLOCK_CHUNKS)
    p_parts = p_largest + i_row * num_chunks + o_chunk
    b_largest = tl.load(p_parts, mask=o_chunk < num_chunks, other=float("-inf"))
    _, i_chunk = tl.max(b_largest, 0, return_indices=True, return_indices_tie_break_left=True)
    tl.store(p_tokens + i_row, tl.load(p_index + i_row * num_chunks + i_chunk).to(tl.int64))


def argmax(logits: torch.Tensor, tokens: torch.Tensor, *, is_dependent: bool) -> None:
    """Writes the first index of each row's largest number into tokens, contiguous int64 `[B, 1]`.

    logits is `[B, V]` with contiguous rows, V > 0. A NaN counts as infinite.
    """
    num_rows, vocab_size = logits.shape
    num_chunks = ceil_div(vocab_size, _CHUNK)
    largest = logits.new_empty((num_rows, num_chunks), dtype=torch.float32)
    index = logits.new_empty((num_rows, num_chunks), dtype=torch.int32)
    options = dependent_launch.launch_options(is_dependent)
    _chunk_kernel(
        (num_chunks, num_rows),
        logits,
        largest,
        index,
        logits.stride(0),
        vocab_size,
        CHUNK=_CHUNK,
        IS_DEPENDENT=is_dependent,
        **options,
    )
    _row_kernel(
        (num_rows,),
        largest,
        index,
        tokens,
        num_chunks,
        BLOCK_CHUNKS=next_power_of_2(num_chunks),
        IS_DEPENDENT=is_dependent,
        num_warps=1,
        **options,
    )
