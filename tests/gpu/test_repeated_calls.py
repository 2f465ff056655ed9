"""Eager calls that repeat an earlier one's launches: other tensors, other streams, captures."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch

from csrc_free_kernels import decode, prefill
from flashcore_ops import attention, attention_with_lse
from tests.problems import assert_as_accurate_as_pytorch, make_problem

pytestmark = pytest.mark.gpu

PROBLEMS: dict[str, dict[str, Any]] = {
    "split decode": {"query_len": 1, "kv_len": 700, "kv_range": [(3, 600), (0, 700)]},
    "decode in one": {"batch": 64, "query_len": 1, "kv_len": 70, "kv_range": [(0, 70)] * 64},
    "decode with options": {"query_len": 3, "kv_len": 300, "window": 90, "softcap": 5.0, "has_sinks": True},
    "portable prefill": {"query_len": 40, "kv_len": 90, "softcap": 5.0},
    "prefill": {"query_len": 40, "kv_len": 90},
}


def make(name: str) -> Any:
    return make_problem(**PROBLEMS[name], head_dim=64, dtype=torch.bfloat16, device="cuda")


KERNELS = {"split decode": (decode, "decode_attention"), "prefill": (prefill, "prefill_attention")}


@pytest.mark.parametrize("name", PROBLEMS)
def test_every_repetition_is_right_on_its_own_tensors(name):
    for _ in range(3):
        problem = make(name)
        output, lse = attention_with_lse(*problem.arguments())
        assert_as_accurate_as_pytorch(output, lse, problem)
        assert torch.equal(attention(*problem.arguments()), output)


@pytest.mark.parametrize("name", KERNELS)
def test_nothing_is_worked_out_again(name):
    arguments = [make(name).arguments() for _ in range(3)]
    attention(*arguments[0])
    with mock.patch.object(*KERNELS[name], side_effect=AssertionError("worked out again")):
        attention(*arguments[1])
        with pytest.raises(AssertionError, match="worked out again"):
            attention(*arguments[2], num_splits=2)


def test_sinks_that_must_be_copied():
    for _ in range(3):
        problem = make("decode with options")
        assert problem.sinks is not None
        spread = torch.stack([problem.sinks, torch.full_like(problem.sinks, torch.nan)], dim=1)[:, 0]
        assert not spread.is_contiguous()
        problem = replace(problem, sinks=spread)
        assert_as_accurate_as_pytorch(attention(*problem.arguments()), None, problem)


def test_keys_that_were_values_too_are_not_taken_for_both():
    first, problem = make("split decode"), make("split decode")
    query, key, _, *rest = first.arguments()
    attention(query, key, key, *rest)
    assert_as_accurate_as_pytorch(attention(*problem.arguments()), None, problem)


def test_repetitions_launch_on_the_current_stream():
    attention(*make("split decode").arguments())
    problem = make("split decode")
    expected = attention(*problem.arguments())
    query = problem.query.clone()
    problem.query.fill_(torch.nan)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)
        problem.query.copy_(query)
        output = attention(*problem.arguments())
    side.synchronize()
    assert torch.equal(output, expected)


def test_repetitions_can_be_captured():
    attention(*make("split decode").arguments())
    problem, other = make("split decode"), make("split decode")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = attention(*problem.arguments())
    for before, after in zip(problem.arguments()[:4], other.arguments()[:4], strict=True):
        before.copy_(after)
    graph.replay()
    assert torch.equal(output, attention(*other.arguments()))
