"""Hopper's decode kernel at tile edges, against the float64 reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from csrc_free_kernels import shares
from csrc_free_kernels.decode_tuning import max_ring_rows
from flashcore_ops import attention, attention_with_lse
from tests.kernels.launches import check_decode, ring_tiles
from tests.problems import assert_as_accurate_as_pytorch, make_problem

WITH_DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


def check(num_splits=2, block_n=64, num_slots=3, **options):
    problem = make_problem(**{"device": "cuda", "head_dim": 64, "dtype": torch.bfloat16, **options})
    group = problem.query.shape[1] // problem.key.shape[1]
    assert shares.is_served_by_ring(problem.query, problem.key, problem.value, 1.0, softcap=0.0)
    check_decode(problem, ring_tiles(group * problem.query.shape[2], block_n, num_slots), num_splits)


@WITH_DTYPES
@pytest.mark.parametrize("num_splits", [1, 2, 5, 17])
@pytest.mark.parametrize(
    ("query_len", "kv_len"), [(1, 1), (1, 63), (1, 64), (1, 65), (1, 700), (3, 130), (3, 2), (8, 400), (2, 0)]
)
def test_splits_and_lengths(dtype, num_splits, query_len, kv_len):
    check(num_splits, query_len=query_len, kv_len=kv_len, dtype=dtype)


@WITH_DTYPES
@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize("query_len", [1, 4])
@pytest.mark.parametrize(
    "options",
    [
        {"is_causal": False, "kv_range": [(0, 297), (13, 64)]},
        {"kv_range": [(290, 20), (-4, 10**9)]},
        {"window": 1},
        {"window": 133, "kv_range": [(10, 290), (0, 33)]},
        {"has_sinks": True, "kv_range": [(5, 9), (0, 0)], "window": 3},
    ],
    ids=str,
)
def test_options(dtype, num_splits, query_len, options):
    check(num_splits, query_len=query_len, kv_len=297, dtype=dtype, **options)


@pytest.mark.parametrize(("num_query_heads", "num_kv_heads"), [(1, 1), (7, 1), (16, 2), (3, 3), (32, 1)])
@pytest.mark.parametrize("num_splits", [1, 2])
def test_packed_heads(num_query_heads, num_kv_heads, num_splits):
    heads = {"num_query_heads": num_query_heads, "num_kv_heads": num_kv_heads}
    check(num_splits, query_len=1, kv_len=300, dtype=torch.bfloat16, **heads)


@pytest.mark.parametrize(
    ("head_dim", "block_n"), [(16, 64), (80, 64), (80, 128), (96, 128), (128, 64), (128, 128), (160, 64), (256, 64)]
)
@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize("has_most_rows", [True, False])
def test_head_dims(head_dim, block_n, num_splits, has_most_rows):
    group = max_ring_rows(head_dim) // 2 if has_most_rows and block_n == 64 else 2
    check(num_splits, block_n, query_len=2, kv_len=500, head_dim=head_dim, num_query_heads=group, num_kv_heads=1)


@pytest.mark.parametrize("query_len", [1, 4])
def test_views_with_other_strides(query_len):
    problem = make_problem(query_len=query_len, kv_len=300, head_dim=64, dtype=torch.float16, device="cuda")
    problem = replace(problem, key=problem.key[:, :1].expand(-1, 2, -1, -1), value=problem.value.clone())
    assert shares.is_served_by_ring(problem.query, problem.key, problem.value, 1.0, softcap=0.0)
    assert problem.key.stride(1) == 0
    check_decode(problem, ring_tiles(2 * query_len, block_n=64, num_slots=3), num_splits=2)


def test_views_that_no_wide_load_can_serve():
    problem = make_problem(query_len=1, kv_len=300, head_dim=64, dtype=torch.float16, device="cuda").inside_larger()
    assert not shares.is_served_by_ring(problem.query, problem.key, problem.value, 1.0, softcap=0.0)
    output = attention(*problem.arguments())
    assert_as_accurate_as_pytorch(output, attention_with_lse(*problem.arguments())[1], problem)


def test_results_repeat_bitwise():
    query = torch.randn(2, 8, 1, 128, dtype=torch.bfloat16, device="cuda")
    key, value = torch.randn(2, 2, 2, 1000, 128, dtype=torch.bfloat16, device="cuda")
    first = attention(query, key, value, num_splits=5)
    assert all(torch.equal(attention(query, key, value, num_splits=5), first) for _ in range(5))


@pytest.mark.parametrize("num_slots", [2, 3, 4, 6])
def test_rings_that_turn(num_slots):
    check(2, 64, num_slots, query_len=1, kv_len=1700, head_dim=128, dtype=torch.bfloat16)
