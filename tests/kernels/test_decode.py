"""The decode and combine kernels over splits, lengths and packed rows, against the float64 reference."""

from __future__ import annotations

import pytest

from csrc_free_kernels.tuning import Tiles
from tests.kernels.conftest import KERNEL_DTYPES
from tests.kernels.launches import check_decode
from tests.problems import make_problem

pytestmark = pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)

TILES = Tiles(block_m=16, block_n=32, num_warps=4, num_stages=2)


@pytest.mark.parametrize("num_splits", [1, 2, 5, 17])
@pytest.mark.parametrize(("query_len", "kv_len"), [(1, 1), (1, 31), (1, 200), (3, 130), (3, 2), (9, 40), (2, 0)])
def test_splits_and_lengths(kernel_device, dtype, num_splits, query_len, kv_len):
    problem = make_problem(query_len=query_len, kv_len=kv_len, dtype=dtype, device=kernel_device)
    check_decode(problem, TILES, num_splits)


@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize("query_len", [1, 4])
@pytest.mark.parametrize(
    "options",
    [
        {"is_causal": False, "kv_range": [(0, 97), (13, 64)]},
        {"kv_range": [(90, 20), (-4, 10**9)]},
        {"window": 1},
        {"window": 33, "kv_range": [(10, 90), (0, 33)]},
        {"softcap": 3.0, "has_sinks": True},
        {"has_sinks": True, "kv_range": [(5, 9), (0, 0)], "window": 3},
    ],
    ids=str,
)
def test_options(kernel_device, dtype, num_splits, query_len, options):
    problem = make_problem(query_len=query_len, kv_len=97, dtype=dtype, device=kernel_device, **options)
    check_decode(problem, TILES, num_splits)


@pytest.mark.parametrize(("num_query_heads", "num_kv_heads"), [(1, 1), (7, 1), (14, 2), (3, 3), (32, 1)])
@pytest.mark.parametrize("query_len", [1, 5])
def test_packed_heads(kernel_device, dtype, num_query_heads, num_kv_heads, query_len):
    problem = make_problem(
        num_query_heads=num_query_heads,
        num_kv_heads=num_kv_heads,
        query_len=query_len,
        kv_len=70,
        dtype=dtype,
        device=kernel_device,
    )
    check_decode(problem, TILES, num_splits=2)


@pytest.mark.parametrize(("head_dim", "value_dim"), [(16, 16), (24, 40), (80, 64), (128, 128), (64, 192)])
def test_head_dims(kernel_device, dtype, head_dim, value_dim):
    problem = make_problem(
        batch=1, kv_len=50, head_dim=head_dim, value_dim=value_dim, dtype=dtype, device=kernel_device
    )
    check_decode(problem, TILES, num_splits=2)
