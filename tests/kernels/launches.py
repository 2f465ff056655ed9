"""Launches a kernel on a problem, into poisoned outputs."""

from __future__ import annotations

import torch
from torch import Tensor

from csrc_free_kernels import decode, linear, prefill, tuning
from csrc_free_kernels.decode_tuning import DecodePlan, RingTiles, ring_rows
from csrc_free_kernels.linear_tuning import LinearTiles, linear_tiles
from csrc_free_kernels.tuning import HopperTiles, Tiles
from tests.kernels.conftest import IS_INTERPRETED
from tests.linear_problems import LinearProblem, assert_linear_as_accurate_as_pytorch
from tests.problems import Problem, assert_as_accurate_as_pytorch


def check_prefill(problem: Problem, tiles: Tiles | HopperTiles, kv_heads_at_a_time: int = 1) -> None:
    output, lse = poisoned_outputs(problem)
    group = problem.query.shape[1] // problem.key.shape[1]
    prefill.prefill_attention(
        *(problem.query, problem.key, problem.value, output, lse),
        **_options(problem),
        cu_seqlens=problem.cu_seqlens_q,
        tiles=tiles,
        section_heads=kv_heads_at_a_time * group,
    )
    assert_as_accurate_as_pytorch(output, lse, problem)


def check_decode(problem: Problem, tiles: Tiles | RingTiles, num_splits: int) -> None:
    output, lse = poisoned_outputs(problem)
    decode.decode_attention(
        problem.query,
        problem.key,
        problem.value,
        output,
        lse,
        **_options(problem),
        plan=DecodePlan(tiles, num_splits),
        is_dependent=is_dependent(problem.query.device),
    )
    assert_as_accurate_as_pytorch(output, lse, problem)


def ring_tiles(num_rows: int, block_n: int, num_slots: int) -> RingTiles:
    """Tiles of Hopper's split-KV kernels for so many packed rows."""
    return RingTiles(ring_rows(num_rows), block_n, num_warps=4, num_slots=num_slots)


def check_linear(problem: LinearProblem, tiles: LinearTiles | None = None) -> None:
    assert_linear_as_accurate_as_pytorch(launch_linear(problem, tiles), problem)


def launch_linear(problem: LinearProblem, tiles: LinearTiles | None = None) -> Tensor:
    """The kernels' result on rows `[M, K]`, in Hopper's tiles unless others are given."""
    num_rows, depth = problem.input.shape
    dtype, is_gated = problem.input.dtype, problem.is_gated
    if tiles is None:
        num_columns = sum(weight.shape[0] for weight in problem.weights)
        tiles = linear_tiles(
            "sm_90",
            dtype,
            num_rows=num_rows,
            num_columns=num_columns,
            depth=depth,
            num_multiprocessors=132,
            # The interpreter does not run Gluon.
            is_aligned=not IS_INTERPRETED and linear.is_aligned(problem.input, problem.weights),
        )
    width = sum(weight.shape[0] for weight in problem.weights) // (2 if is_gated else 1)
    output = torch.full((num_rows, width), torch.nan, dtype=_output_dtype(dtype), device=problem.input.device)
    linear.linear(
        problem.input,
        problem.weights,
        output,
        norm_weight=problem.norm_weight,
        eps=problem.eps,
        residual=problem.residual,
        is_gated=is_gated,
        has_constant_weights=problem.has_constant_weights,
        tiles=tiles,
        is_dependent=is_dependent(problem.input.device),
    )
    return output


def poisoned_outputs(problem: Problem) -> tuple[Tensor, Tensor]:
    lse = torch.full(problem.query.shape[:3], torch.nan, device=problem.query.device)
    return poisoned_output(problem.query, problem.value), lse


def poisoned_output(query: Tensor, value: Tensor) -> Tensor:
    batch, num_query_heads, query_len, _ = query.shape
    shape = (batch, query_len, num_query_heads, value.shape[3])
    # Rows without a slot are NaN by definition; infinity is neither that nor any other right answer.
    return torch.full(shape, torch.inf, dtype=_output_dtype(query.dtype), device=query.device).transpose(1, 2)


def is_dependent(device: torch.device) -> bool:
    """Whether the CUDA path would launch decode's kernels dependent on this device."""
    return device.type == "cuda" and tuning.supports_dependent_launch(tuning.architecture(device))


def _output_dtype(dtype: torch.dtype) -> torch.dtype:
    """The interpreter truncates a cast to bfloat16 where the hardware rounds: there the result stays in float32."""
    return torch.float32 if IS_INTERPRETED and dtype == torch.bfloat16 else dtype


def _options(problem: Problem) -> dict[str, object]:
    return {
        "kv_range": problem.kv_range,
        "sinks": problem.sinks,
        "scale": problem.query.shape[3] ** -0.5 if problem.scale is None else problem.scale,
        "is_causal": problem.is_causal,
        "window": problem.window,
        "softcap": problem.softcap,
    }
