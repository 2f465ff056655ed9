"""Hopper's decode kernel at tile edges, and behind a kernel that changes the range, against the float64 reference."""

from __future__ import annotations

import pytest
import torch

from csrc_free_kernels import shares
from csrc_free_kernels.step_input import step_input
from flashcore_ops import attention
from tests.kernels.launches import check_decode, ring_tiles
from tests.problems import make_problem

pytestmark = pytest.mark.skipif(torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU")
WITH_DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


def check(num_splits=2, block_n=64, num_slots=3, **options):
    problem = make_problem(**{"device": "cuda", "head_dim": 64, **options})
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
def test_head_dims(head_dim, block_n, num_splits):
    check(num_splits, block_n, query_len=2, kv_len=500, head_dim=head_dim, dtype=torch.bfloat16)


@pytest.mark.parametrize("num_slots", [2, 3, 4, 6])
def test_rings_that_turn(num_slots):
    check(2, 64, num_slots, query_len=1, kv_len=1700, head_dim=128, dtype=torch.bfloat16)


def test_a_range_that_the_kernel_ahead_still_changes():
    """It lets its dependents start at once: they read the range as it was, and must not keep what followed from it."""
    kv_len, ends = 700, [5, 700, 64, 65, 699, 1, 700, 128]
    query = torch.randn(1, 8, 1, 128, dtype=torch.bfloat16, device="cuda")
    key, value = torch.randn(2, 1, 2, kv_len, 128, dtype=torch.bfloat16, device="cuda")
    kv_range = torch.zeros(1, 2, dtype=torch.int32, device="cuda")
    lengths = [torch.tensor(end - 1, device="cuda") for end in ends]
    outputs = []
    for length in lengths:
        write_range(kv_range, length)
        outputs.append(attention(query, key, value, kv_range))
    for end, output in zip(ends, outputs, strict=True):
        at_rest = torch.tensor([[0, end]], dtype=torch.int32, device="cuda")
        assert torch.equal(output, attention(query, key, value, at_rest))


def write_range(kv_range: torch.Tensor, length: torch.Tensor) -> None:
    """As a decode step does, among work that takes a while."""
    start, offset = kv_range.new_zeros(1), length.new_zeros(1)
    step_input(
        *(offset[:, None], start, offset, length),
        embedding=torch.zeros(8, 4096, device="cuda"),
        inv_freq=torch.zeros(64, device="cuda"),
        attention_scaling=1.0,
        hidden=torch.empty(1, 1, 4096, device="cuda"),
        cos=torch.empty(1, 1, 128, device="cuda"),
        sin=torch.empty(1, 1, 128, device="cuda"),
        kv_range=kv_range,
        is_dependent=True,
    )
