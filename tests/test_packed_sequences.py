"""Sequences packed into one row of tokens: as if each were a batch of its own."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch.library import opcheck

from flashcore_ops import attention, attention_with_lse
from tests.problems import DTYPES, Problem, assert_as_accurate_as_pytorch, make_problem

# 150 tokens: lengths of 1 and 0, tile edges, and a rest that no sequence has.
CU_SEQLENS = [0, 1, 1, 65, 129, 131, 149]
NUM_TOKENS = 150


def packed(device: str, **options: object) -> Problem:
    options = {"query_len": NUM_TOKENS, "kv_len": NUM_TOKENS, "cu_seqlens_q": CU_SEQLENS} | options
    return make_problem(batch=1, device=device, **options)  # type: ignore[arg-type]


def check(problem: Problem) -> None:
    output, lse = attention_with_lse(*problem.arguments(), cu_seqlens_q=problem.cu_seqlens_q)
    assert_as_accurate_as_pytorch(output, lse, problem)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_head_dims(device, dtype, head_dim):
    problem = packed(device, dtype=dtype, head_dim=head_dim)
    output = attention(*problem.arguments(), cu_seqlens_q=problem.cu_seqlens_q)
    assert_as_accurate_as_pytorch(output, None, problem)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": False},
        {"window": 9},
        {"softcap": 3.0, "has_sinks": True},
        {"num_query_heads": 7, "num_kv_heads": 1, "value_dim": 64},
        {"cu_seqlens_q": [0]},
        {"cu_seqlens_q": [0, 150]},
        {"cu_seqlens_q": [0, *range(1, 151)]},
        {"query_len": 7, "kv_len": 7, "cu_seqlens_q": [0, 3, 7]},
        {"query_len": 0, "kv_len": 0, "cu_seqlens_q": [0, 0, 0]},
    ],
    ids=str,
)
def test_options(device, options):
    check(packed(device, **options))


@pytest.mark.parametrize("is_causal", [True, False])
def test_each_sequence_sees_its_own_range_of_a_cache(device, is_causal):
    """Chunks of three prompts against caches that lie in one tensor, the first of them empty, the last beyond it."""
    ranges = [(0, 0), (7, 99), (100, 203), (190, 999)]
    check(
        packed(
            device,
            query_len=90,
            kv_len=203,
            cu_seqlens_q=[0, 5, 40, 41, 90],
            kv_range=ranges,
            is_causal=is_causal,
            has_sinks=True,
        )
    )


def test_equals_a_batch_for_each_sequence(device):
    problem = packed(device, head_dim=64)
    whole = attention(*problem.arguments(), cu_seqlens_q=problem.cu_seqlens_q)
    for first, last in pairwise(CU_SEQLENS):
        rows = slice(first, last)
        alone = attention(problem.query[:, :, rows], problem.key[:, :, rows], problem.value[:, :, rows])
        torch.testing.assert_close(whole[:, :, rows], alone, rtol=1e-5, atol=1e-5)


def test_a_sequence_full_of_nan_spoils_no_other(device):
    problem = packed(device)
    clean = attention(*problem.arguments(), cu_seqlens_q=problem.cu_seqlens_q)
    problem.key[:, :, 65:129] = torch.nan
    problem.value[:, :, 65:129] = torch.inf
    output = attention(*problem.arguments(), cu_seqlens_q=problem.cu_seqlens_q)
    for rows in (slice(0, 65), slice(129, None)):
        assert torch.equal(output[:, :, rows], clean[:, :, rows])


def test_bounds_outside_the_tensors_stay_inside(device):
    problem = packed(device, cu_seqlens_q=[0, NUM_TOKENS])
    bounds = torch.tensor([-7, 40, 10**6, 2**31 - 1], dtype=torch.int32, device=device)
    expected = bounds.new_tensor([0, 40, 150, 150])
    actual = attention(*problem.arguments(), cu_seqlens_q=bounds)
    assert torch.equal(actual, attention(*problem.arguments(), cu_seqlens_q=expected))


def test_strided_bounds(device):
    problem = packed(device)
    spread = torch.tensor(CU_SEQLENS, dtype=torch.int32, device=device).repeat_interleave(2)[::2]
    assert not spread.is_contiguous()
    expected = attention(*problem.arguments(), cu_seqlens_q=problem.cu_seqlens_q)
    assert torch.equal(attention(*problem.arguments(), cu_seqlens_q=spread), expected)


@pytest.mark.parametrize("op", ["attention", "attention_with_lse"])
def test_opcheck(device, op):
    problem = packed(device)
    opcheck(getattr(torch.ops.flashcore, op).default, problem.arguments(), {"cu_seqlens_q": problem.cu_seqlens_q})
