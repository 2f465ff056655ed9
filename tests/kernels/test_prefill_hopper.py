"""Hopper's prefill kernel at tile edges, against the float64 reference, by a few programs that take many tiles each."""

from __future__ import annotations

import pytest
import torch

from csrc_free_kernels import prefill, tuning
from tests.kernels.launches import check_prefill
from tests.problems import make_problem

pytestmark = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


def check(**problem):
    problem = make_problem(**problem)
    head_dim = problem.query.shape[3]
    assert prefill.is_served_by_hopper(problem.query, problem.key, problem.value, 1.0, softcap=0.0, cu_seqlens=None)
    check_prefill(problem, tuning.hopper_prefill_tiles(head_dim, num_multiprocessors=7))


@pytest.mark.parametrize(
    ("query_len", "kv_len"),
    [(1, 1), (63, 64), (64, 63), (129, 127), (128, 128), (1, 700), (300, 300), (257, 1000), (700, 20)],
)
@pytest.mark.parametrize("is_causal", [True, False])
def test_tile_edges(kernel_device, dtype, query_len, kv_len, is_causal):
    check(query_len=query_len, kv_len=kv_len, is_causal=is_causal, dtype=dtype, device=kernel_device)


@pytest.mark.parametrize("head_dim", [16, 64, 80, 128, 160, 256])
def test_head_dims(kernel_device, dtype, head_dim):
    check(query_len=300, kv_len=403, head_dim=head_dim, dtype=dtype, device=kernel_device)


@pytest.mark.parametrize(
    "options",
    [
        {"kv_range": [(0, 403), (13, 64)]},
        {"kv_range": [(390, 20), (-4, 10**9)]},
        {"kv_range": [(0, 128), (0, 129)], "has_sinks": True},
        {"kv_range": [(200, 330), (127, 402)], "is_causal": False},
        {"window": 1},
        {"window": 128},
        {"window": 129, "kv_range": [(10, 390), (0, 133)]},
        {"has_sinks": True, "kv_range": [(5, 9), (0, 0)], "window": 3},
    ],
    ids=str,
)
def test_options(kernel_device, dtype, options):
    check(query_len=300, kv_len=403, head_dim=128, dtype=dtype, device=kernel_device, **options)
