"""Hopper's fused decode kernel over splits, lengths and layouts, against the float64 reference."""

from __future__ import annotations

import pytest
import torch

from csrc_free_kernels import shares
from csrc_free_kernels.decode_tuning import max_ring_rows
from tests.kernels import test_rope_decode
from tests.kernels.launches import poisoned_output, ring_tiles
from tests.rope_problems import make_rope_problem

WITH_DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


def check(num_splits, block_n=64, num_slots=3, **options):
    problem = make_rope_problem(**{"device": "cuda", "head_dim": 64, "dtype": torch.bfloat16, **options})
    group = problem.query.shape[1] // problem.key.shape[1]
    assert shares.is_served_by_ring(problem.query, problem.key_cache, problem.value_cache, 1.0, softcap=0.0)
    test_rope_decode.check(problem, num_splits, ring_tiles(group, block_n, num_slots))


@WITH_DTYPES
@pytest.mark.parametrize("num_splits", [1, 2, 5, 17])
@pytest.mark.parametrize("kv_len", [1, 2, 64, 65, 66, 700])
def test_splits_and_lengths(dtype, num_splits, kv_len):
    check(num_splits, kv_len=kv_len, dtype=dtype)


@WITH_DTYPES
@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize(
    "options",
    [
        {"kv_range": [(0, 1), (0, 64)]},
        {"kv_range": [(13, 64), (296, 297)], "is_rotation_shared": True},
        {"kv_range": [(-4, 297), (20, 290)], "has_sinks": True},
        {"window": 1, "kv_range": [(0, 297), (10, 11)]},
        {"window": 2},
        {"window": 133, "kv_range": [(10, 290), (0, 33)]},
        {"kv_range": [(30, 30), (39, 20)]},
    ],
    ids=str,
)
def test_options(dtype, num_splits, options):
    check(num_splits, kv_len=297, dtype=dtype, **options)


@pytest.mark.parametrize("num_splits", [1, 4])
@pytest.mark.parametrize("has_sinks", [True, False])
def test_rows_without_a_slot_are_nan_and_write_nothing(num_splits, has_sinks):
    kv_range = [(3, end) for end in (98, 2**31 - 1, 0, -1, -(2**31), 97)]
    check(num_splits, batch=6, kv_len=97, kv_range=kv_range, has_sinks=has_sinks, window=9)


@pytest.mark.parametrize(("num_query_heads", "num_kv_heads"), [(1, 1), (7, 1), (14, 2), (3, 3), (32, 1)])
def test_packed_heads(num_query_heads, num_kv_heads):
    check(2, num_query_heads=num_query_heads, num_kv_heads=num_kv_heads, kv_len=170)


@pytest.mark.parametrize("head_dim", [16, 80, 96, 128, 160, 256])
@pytest.mark.parametrize("num_splits", [1, 2])
@pytest.mark.parametrize("has_most_rows", [True, False])
def test_head_dims(head_dim, num_splits, has_most_rows):
    group = max_ring_rows(head_dim) if has_most_rows else 4
    check(num_splits, kv_len=300, head_dim=head_dim, num_query_heads=group, num_kv_heads=1)


def test_results_repeat_bitwise():
    problem = make_rope_problem(kv_len=1000, head_dim=128, dtype=torch.bfloat16, device="cuda")
    first, again = (poisoned_output(problem.query, problem.value) for _ in range(2))
    tiles = ring_tiles(2, block_n=64, num_slots=3)
    test_rope_decode.launch(problem.with_own_caches(), first, 5, tiles)
    for _ in range(5):
        test_rope_decode.launch(problem.with_own_caches(), again, 5, tiles)
        assert torch.equal(first, again)
