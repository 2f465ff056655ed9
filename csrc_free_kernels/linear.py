"""Linear layers of decode: a few rows times large weight matrices, bound by the bytes of the weights.

All kernels read up to three weight matrices in one launch, add a residual or gate a SwiGLU on the way out, and ask for
their first weights before the kernel ahead has ended.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from csrc_free_kernels import dependent_launch, linear_portable, softmax
from csrc_free_kernels.launch import Launcher
from csrc_free_kernels.linear_tuning import LinearTiles, is_one_row_at_a_time
from csrc_free_kernels.tuning import ceil_div


@Launcher
@triton.jit
def _norm_kernel(p_input, p_norm, p_output, stride_input, eps, K: tl.constexpr, IS_DEPENDENT: tl.constexpr):
    """RMSNorm of one row, rounded as transformers rounds it: to the row's dtype before the norm's weight."""
    BLOCK_K: tl.constexpr = triton.next_power_of_2(K)
    dependent_launch.launch_dependents(IS_DEPENDENT)
    dependent_launch.wait(IS_DEPENDENT)
    i_m = tl.program_id(0).to(tl.int64)
    o_k = tl.arange(0, BLOCK_K)
    m_k = o_k < K
    b_x = tl.load(p_input + i_m * stride_input + o_k, mask=m_k, other=0.0).to(tl.float32)
    b_x *= tl.rsqrt(tl.sum(b_x * b_x, 0) / K + eps)
    b_x = b_x.to(p_output.dtype.element_ty).to(tl.float32)
    b_x *= tl.load(p_norm + o_k, mask=m_k, other=0.0).to(tl.float32)
    tl.store(p_output + i_m * K + o_k, b_x.to(p_output.dtype.element_ty), mask=m_k)


def is_aligned(rows: torch.Tensor, weights: list[torch.Tensor]) -> bool:
    """Whether every row of the input and of the weights begins at a multiple of 16 bytes that the compiler knows of."""
    return all(
        tensor.data_ptr() % 16 == 0 and tensor.stride(0) % 16 == 0 and tensor.shape[1] % 16 == 0
        for tensor in (rows, *weights)
    )


def linear(
    rows: torch.Tensor,
    weights: list[torch.Tensor],
    output: torch.Tensor,
    *,
    norm_weight: torch.Tensor | None,
    eps: float,
    residual: torch.Tensor | None,
    is_gated: bool,
    has_constant_weights: bool,
    tiles: LinearTiles,
    is_dependent: bool,
) -> None:
    """Writes the products of rows `[M, K]` with up to three weights `[N_i, K]` side by side into output `[M, N]`.

    Constant weights are those that no kernel launched shortly before may write: they may be read before it has ended.
    output is contiguous; residual `[M, N]` has contiguous rows; M, K and every N_i are above 0. Tiles with a ring need
    rows and weights that are aligned.
    """
    num_rows, depth = rows.shape
    is_one_at_a_time = is_one_row_at_a_time(num_rows, rows.dtype)
    # A row before its norm times the norm's weight may exceed float16.
    has_norm_inside = is_one_at_a_time or (tiles.has_ring and rows.dtype != torch.float16)
    if norm_weight is not None and not has_norm_inside:
        rows, norm_weight = _norm(rows, norm_weight, eps, is_dependent), None
    first, second, third = (*weights, weights[0], weights[0])[:3]
    sizes = [weight.shape[0] for weight in (weights[:1] if is_gated else weights)]
    num_tiles = sum(ceil_div(size, tiles.block_n // 2 if is_gated else tiles.block_n) for size in sizes)
    num_rows_of = (sizes[0], sizes[1] if len(sizes) > 1 else None, sizes[2] if len(sizes) > 2 else 0)
    strides = (rows.stride(0), 0 if residual is None else residual.stride(0))
    constants = {
        "K": depth,
        "BLOCK_N": tiles.block_n,
        "BLOCK_K": tiles.block_k,
        "IS_GATED": is_gated,
        "IS_DEPENDENT": is_dependent,
        "num_warps": tiles.num_warps,
        **dependent_launch.launch_options(is_dependent),
    }
    if tiles.has_ring:
        # Imported here alone: it needs a Triton that has Gluon.
        from csrc_free_kernels import linear_hopper

        linear_hopper.ring_kernel(
            (num_tiles, ceil_div(num_rows, tiles.block_m)),
            *(rows, norm_weight, eps, residual, output, first, second, third, num_rows, *num_rows_of),
            *(output.shape[1], *strides),
            BLOCK_M=tiles.block_m,
            NUM_SLOTS=tiles.num_stages,
            HAS_CONSTANT_WEIGHTS=has_constant_weights,
            **constants,
        )
        return
    second_weight = (second.data_ptr() - first.data_ptr()) // second.element_size() if is_gated else second
    matrices = (residual, output, first, second_weight, third, num_rows, *num_rows_of, output.shape[1], *strides)
    # A row kernel holds the first block of constant weights in registers by then.
    num_ahead = depth - tiles.block_k if is_one_at_a_time and has_constant_weights else depth
    line_budget = tiles.prefetched_bytes // (output.shape[1] * (2 if is_gated else 1))
    constants["NUM_LINES"] = _num_prefetched_lines(num_ahead * rows.element_size(), line_budget)
    constants["num_stages"] = tiles.num_stages
    if is_one_at_a_time:
        linear_portable.row_kernel(
            (num_tiles * num_rows,),
            *(rows, norm_weight, eps, *matrices),
            HAS_CONSTANT_WEIGHTS=has_constant_weights,
            **constants,
        )
    else:
        linear_portable.tile_kernel(
            (num_tiles, ceil_div(num_rows, tiles.block_m)),
            *(rows, *matrices),
            BLOCK_M=tiles.block_m,
            DOT_DTYPE=softmax.dot_dtype(rows.dtype),
            **constants,
        )


def _num_prefetched_lines(row_bytes: int, budget: int) -> int:
    """Lines of a weight row to ask for ahead: a power of two, inside the row, since past the last may be no memory."""
    num_bytes = min(row_bytes, budget)
    return 1 << max(0, (num_bytes // dependent_launch.LINE_BYTES.value).bit_length() - 1)


def _norm(rows: torch.Tensor, norm_weight: torch.Tensor, eps: float, is_dependent: bool) -> torch.Tensor:
    normed = rows.new_empty(rows.shape)
    _norm_kernel(
        (rows.shape[0],),
        rows,
        norm_weight,
        normed,
        rows.stride(0),
        eps,
        K=rows.shape[1],
        IS_DEPENDENT=is_dependent,
        num_warps=8,
        **dependent_launch.launch_options(is_dependent),
    )
    return normed
