"""The fused decode kernel over splits, lengths and layouts, against the float64 reference."""

from __future__ import annotations

import pytest
import torch

from csrc_free_kernels import rope_decode
from csrc_free_kernels.decode_tuning import DecodePlan, RingTiles
from csrc_free_kernels.tuning import Tiles
from flashcore_ops import reference
from tests.kernels.conftest import IS_INTERPRETED, KERNEL_DTYPES
from tests.kernels.launches import is_dependent, poisoned_output
from tests.rope_problems import RopeProblem, assert_appended, assert_output_as_accurate_as_pytorch, make_rope_problem

pytestmark = pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)

TILES = Tiles(block_m=16, block_n=32, num_warps=4, num_stages=2)


def check(problem: RopeProblem, num_splits: int, tiles: Tiles | RingTiles = TILES) -> None:
    after, output = problem.with_own_caches(), poisoned_output(problem.query, problem.value)
    launch(after, output, num_splits, tiles)
    assert_output_as_accurate_as_pytorch(output, problem)
    # A GPU rotates with fused multiply-adds, the interpreter without.
    assert_appended(problem, after, key=rotated_in_the_interpreter(problem) if IS_INTERPRETED else None)


def rotated_in_the_interpreter(problem: RopeProblem) -> torch.Tensor:
    wide = reference.rotate(problem.key.float(), problem.cos.float(), problem.sin.float())
    if problem.key.dtype == torch.bfloat16:
        # Its casts to bfloat16 truncate.
        wide = (wide.view(torch.int32) & -(2**16)).view(torch.float32)
    return wide.to(problem.key.dtype)


def launch(problem: RopeProblem, output: torch.Tensor, num_splits: int, tiles: Tiles | RingTiles = TILES) -> None:
    rope_decode.rope_append_attention(
        *(problem.query, problem.key, problem.value, problem.cos, problem.sin),
        *(problem.key_cache, problem.value_cache, output),
        kv_range=problem.kv_range,
        sinks=problem.sinks,
        scale=problem.query.shape[3] ** -0.5 if problem.scale is None else problem.scale,
        window=problem.window,
        softcap=problem.softcap,
        next_weight=None,
        plan=DecodePlan(tiles, num_splits),
        is_dependent=is_dependent(problem.query.device),
    )


@pytest.mark.parametrize("num_splits", [1, 2, 5, 17])
@pytest.mark.parametrize("kv_len", [1, 2, 16, 31, 33, 200])
def test_splits_and_lengths(kernel_device, dtype, num_splits, kv_len):
    check(make_rope_problem(kv_len=kv_len, dtype=dtype, device=kernel_device), num_splits)


@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize(
    "options",
    [
        {"kv_range": [(0, 1), (0, 64)]},
        {"kv_range": [(13, 64), (96, 97)], "is_rotation_shared": True},
        {"kv_range": [(-4, 97), (20, 90)], "has_sinks": True},
        {"window": 1, "kv_range": [(0, 97), (10, 11)]},
        {"window": 2},
        {"window": 33, "kv_range": [(10, 90), (0, 33)]},
        {"window": 40, "kv_range": [(60, 90), (0, 97)], "softcap": 3.0, "has_sinks": True},
        {"softcap": 3.0},
        {"scale": -0.3},
        {"scale": 0.0, "value_dim": 64},
    ],
    ids=str,
)
def test_options(kernel_device, dtype, num_splits, options):
    check(make_rope_problem(kv_len=97, dtype=dtype, device=kernel_device, **options), num_splits)


@pytest.mark.parametrize("num_splits", [1, 4])
@pytest.mark.parametrize("has_sinks", [True, False])
def test_rows_without_a_slot_are_nan_and_write_nothing(kernel_device, dtype, num_splits, has_sinks):
    ends = [98, 2**31 - 1, 0, -1, -(2**31), 97]
    problem = make_rope_problem(
        batch=len(ends),
        kv_len=97,
        dtype=dtype,
        device=kernel_device,
        kv_range=[(3, end) for end in ends],
        has_sinks=has_sinks,
        window=9,
    )
    assert problem.has_slot().tolist() == [False] * 5 + [True]
    check(problem, num_splits)


@pytest.mark.parametrize("num_splits", [1, 4])
def test_rows_that_see_nothing_are_0_and_append(kernel_device, dtype, num_splits):
    problem = make_rope_problem(kv_len=40, dtype=dtype, device=kernel_device, kv_range=[(30, 30), (39, 20)])
    check(problem, num_splits)


@pytest.mark.parametrize("num_splits", [1, 2])
def test_a_cache_without_slots(kernel_device, dtype, num_splits):
    check(make_rope_problem(kv_len=0, dtype=dtype, device=kernel_device, kv_range=[(0, 0), (0, 1)]), num_splits)


@pytest.mark.parametrize(("num_query_heads", "num_kv_heads"), [(1, 1), (7, 1), (14, 2), (3, 3), (35, 1)])
def test_packed_heads(kernel_device, dtype, num_query_heads, num_kv_heads):
    problem = make_rope_problem(
        num_query_heads=num_query_heads, num_kv_heads=num_kv_heads, kv_len=70, dtype=dtype, device=kernel_device
    )
    check(problem, num_splits=2)


@pytest.mark.parametrize(("head_dim", "value_dim"), [(16, 16), (24, 40), (64, 64), (80, 80), (80, 64), (128, 128)])
@pytest.mark.parametrize("num_splits", [1, 2])
def test_head_dims(kernel_device, dtype, head_dim, value_dim, num_splits):
    problem = make_rope_problem(
        num_query_heads=7,
        num_kv_heads=1,
        kv_len=50,
        head_dim=head_dim,
        value_dim=value_dim,
        dtype=dtype,
        device=kernel_device,
    )
    check(problem, num_splits)


def test_results_repeat_bitwise(kernel_device, dtype):
    problem = make_rope_problem(kv_len=200, head_dim=64, dtype=dtype, device=kernel_device)
    outputs = []
    for _ in range(3):
        outputs.append(poisoned_output(problem.query, problem.value))
        launch(problem.with_own_caches(), outputs[-1], num_splits=5)
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])
