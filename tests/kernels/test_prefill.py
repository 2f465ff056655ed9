"""The prefill kernel at tile edges, against the float64 reference."""

from __future__ import annotations

import pytest

from csrc_free_kernels.tuning import Tiles
from tests.kernels.conftest import KERNEL_DTYPES
from tests.kernels.launches import check_prefill
from tests.problems import make_problem

pytestmark = pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)

TILES = Tiles(block_m=32, block_n=32, num_warps=4, num_stages=2)


@pytest.mark.parametrize(
    ("query_len", "kv_len"), [(1, 1), (31, 31), (32, 32), (33, 33), (1, 70), (65, 64), (40, 100), (70, 20), (33, 0)]
)
@pytest.mark.parametrize("is_causal", [True, False])
def test_tile_edges(kernel_device, dtype, query_len, kv_len, is_causal):
    problem = make_problem(
        batch=1,
        num_query_heads=2,
        query_len=query_len,
        kv_len=kv_len,
        is_causal=is_causal,
        dtype=dtype,
        device=kernel_device,
    )
    check_prefill(problem, TILES)


@pytest.mark.parametrize(
    "options",
    [
        {"kv_range": [(0, 97), (13, 64)]},
        {"kv_range": [(90, 20), (-4, 10**9)]},
        {"window": 1},
        {"window": 32},
        {"window": 33, "kv_range": [(10, 90), (0, 33)]},
        {"window": 70},
        {"softcap": 3.0, "has_sinks": True},
        {"has_sinks": True, "kv_range": [(5, 9), (0, 0)], "window": 3},
    ],
    ids=str,
)
def test_options(kernel_device, dtype, options):
    problem = make_problem(query_len=65, kv_len=97, dtype=dtype, device=kernel_device, **options)
    check_prefill(problem, TILES)


@pytest.mark.parametrize(("head_dim", "value_dim"), [(16, 16), (24, 40), (80, 64), (128, 128), (64, 192)])
def test_head_dims(kernel_device, dtype, head_dim, value_dim):
    problem = make_problem(
        batch=1,
        num_query_heads=7,
        num_kv_heads=1,
        query_len=35,
        kv_len=50,
        head_dim=head_dim,
        value_dim=value_dim,
        dtype=dtype,
        device=kernel_device,
    )
    check_prefill(problem, TILES)


@pytest.mark.parametrize(
    "options",
    [
        {"cu_seqlens_q": [0, 1, 1, 33, 65, 90]},
        {"cu_seqlens_q": [0, 97], "is_causal": False},
        {"cu_seqlens_q": [0, 40, 41], "kv_range": [(3, 70), (96, 200)], "window": 33, "has_sinks": True},
    ],
    ids=str,
)
def test_packed_sequences(kernel_device, dtype, options):
    problem = make_problem(batch=1, query_len=97, kv_len=97, dtype=dtype, device=kernel_device, **options)
    check_prefill(problem, TILES)
