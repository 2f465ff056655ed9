"""Launches a kernel on a problem, into poisoned outputs."""

from __future__ import annotations

import torch
from torch import Tensor

from csrc_free_kernels import decode, prefill, tuning
from csrc_free_kernels.tuning import Tiles
from tests.kernels.conftest import IS_INTERPRETED
from tests.problems import Problem, assert_as_accurate_as_pytorch


def check_prefill(problem: Problem, tiles: Tiles) -> None:
    output, lse = poisoned_outputs(problem)
    prefill.prefill_attention(problem.query, problem.key, problem.value, output, lse, **_options(problem), tiles=tiles)
    assert_as_accurate_as_pytorch(output, lse, problem)


def check_decode(problem: Problem, tiles: Tiles, num_splits: int) -> None:
    output, lse = poisoned_outputs(problem)
    decode.decode_attention(
        problem.query,
        problem.key,
        problem.value,
        output,
        lse,
        **_options(problem),
        num_splits=num_splits,
        tiles=tiles,
        is_dependent=is_dependent(problem.query.device),
    )
    assert_as_accurate_as_pytorch(output, lse, problem)


def poisoned_outputs(problem: Problem) -> tuple[Tensor, Tensor]:
    lse = torch.full(problem.query.shape[:3], torch.nan, device=problem.query.device)
    return poisoned_output(problem.query, problem.value), lse


def poisoned_output(query: Tensor, value: Tensor) -> Tensor:
    batch, num_query_heads, query_len, _ = query.shape
    shape = (batch, query_len, num_query_heads, value.shape[3])
    # The interpreter truncates a cast to bfloat16 where the hardware rounds: there the result stays in float32.
    is_truncated = IS_INTERPRETED and query.dtype == torch.bfloat16
    dtype = torch.float32 if is_truncated else query.dtype
    # Rows without a slot are NaN by definition; infinity is neither that nor any other right answer.
    return torch.full(shape, torch.inf, dtype=dtype, device=query.device).transpose(1, 2)


def is_dependent(device: torch.device) -> bool:
    """Whether the CUDA path would launch decode's kernels dependent on this device."""
    return device.type == "cuda" and tuning.supports_dependent_launch(tuning.architecture(device))


def _options(problem: Problem) -> dict[str, object]:
    return {
        "kv_range": problem.kv_range,
        "sinks": problem.sinks,
        "scale": problem.query.shape[3] ** -0.5 if problem.scale is None else problem.scale,
        "is_causal": problem.is_causal,
        "window": problem.window,
        "softcap": problem.softcap,
    }
