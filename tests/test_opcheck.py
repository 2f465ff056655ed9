"""torch.library.opcheck on every op: schema, fake kernel and autograd registration over the argument space."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.library import opcheck

from tests.linear_problems import make_linear
from tests.problems import DTYPES, make_problem
from tests.rope_problems import make_rope_problem

ATTENTION_CASES = {
    "prefill": {"query_len": 20, "kv_len": 20},
    "decode": {"query_len": 1},
    "kv_range": {"kv_range": [(0, 20), (7, 33)]},
    "every option": {"kv_range": [(0, 20), (7, 33)], "window": 9, "softcap": 3.0, "has_sinks": True, "scale": 0.5},
    "not causal": {"is_causal": False},
    "value_dim": {"value_dim": 64},
    "multi-query": {"num_query_heads": 7, "num_kv_heads": 1},
    "no slots": {"kv_len": 0},
    "no tokens": {"query_len": 0},
    "no batch": {"batch": 0},
}


@pytest.mark.parametrize("op", ["attention", "attention_with_lse"])
@pytest.mark.parametrize("case", ATTENTION_CASES)
def test_attention(device, op, case):
    problem = make_problem(**ATTENTION_CASES[case], device=device)
    # opcheck compares outputs of two runs, and NaN is not equal to NaN; the ops' outputs hold none.
    opcheck(getattr(torch.ops.flashcore, op).default, problem.arguments())


@pytest.mark.parametrize("op", ["attention", "attention_with_lse"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_dtypes(device, op, dtype):
    problem = make_problem(dtype=dtype, device=device, has_sinks=True)
    opcheck(getattr(torch.ops.flashcore, op).default, problem.arguments())


@pytest.mark.parametrize("op", ["attention", "attention_with_lse"])
@pytest.mark.parametrize("layout", ["head-major", "expanded", "sliced"])
def test_attention_layouts(device, op, layout):
    problem = make_problem(device=device)
    query, key, value = problem.query, problem.key, problem.value
    if layout == "head-major":
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    elif layout == "expanded":
        key, value = key[:1].expand(2, -1, -1, -1), value[:, :1].expand(-1, 2, -1, -1)
    else:
        query, key, value = query[:, :, 1:], key[:, :, :-3], value[:, :, :-3]
    opcheck(getattr(torch.ops.flashcore, op).default, (query, key, value))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("positions", [[0, 3], [-2, 7]])
@pytest.mark.parametrize("positions_dtype", [torch.int32, torch.int64])
def test_append_kv(device, dtype, positions, positions_dtype):
    caches = [torch.randn(2, 3, 8, dim, dtype=dtype, device=device) for dim in (16, 24)]
    tokens = [torch.randn(2, 2, 3, dim, dtype=dtype, device=device).transpose(1, 2) for dim in (16, 24)]
    arguments = (*caches, *tokens, torch.tensor(positions, dtype=positions_dtype, device=device))
    opcheck(torch.ops.flashcore.append_kv_.default, arguments)


@pytest.mark.parametrize(("batch", "num_tokens", "num_slots"), [(0, 2, 8), (2, 0, 8), (2, 2, 0), (2, 2, 8)], ids=str)
def test_append_kv_token_major_and_empty(device, batch, num_tokens, num_slots):
    caches = [torch.randn(batch, num_slots, 3, 16, device=device).transpose(1, 2) for _ in range(2)]
    tokens = [torch.randn(batch, num_tokens, 3, 16, device=device).transpose(1, 2) for _ in range(2)]
    positions = torch.zeros(batch, dtype=torch.int64, device=device)
    opcheck(torch.ops.flashcore.append_kv_.default, (*caches, *tokens, positions))


ROPE_CASES = {
    "plain": {},
    "padded and shared rotation": {"kv_range": [(0, 20), (7, 33)], "is_rotation_shared": True},
    "every option": {"kv_range": [(0, 20), (7, 33)], "window": 9, "softcap": 3.0, "has_sinks": True, "scale": 0.5},
    "value_dim": {"value_dim": 64},
    "multi-query": {"num_query_heads": 7, "num_kv_heads": 1},
    "no batch": {"batch": 0},
}


def check_rope(problem):
    """opcheck compares two runs, and NaN is not equal to NaN: no slot is poisoned here."""
    caches = [cache.nan_to_num() for cache in (problem.key_cache, problem.value_cache)]
    opcheck(
        torch.ops.flashcore.rope_append_attention.default,
        replace(problem, key_cache=caches[0], value_cache=caches[1]).arguments(),
    )


@pytest.mark.parametrize("case", ROPE_CASES)
def test_rope_append_attention(device, case):
    check_rope(make_rope_problem(**ROPE_CASES[case], device=device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rope_append_attention_dtypes(device, dtype):
    check_rope(make_rope_problem(dtype=dtype, device=device, has_sinks=True))


LINEAR_CASES = {
    "plain": {},
    "one dim": {"shape": (64,)},
    "no rows": {"shape": (2, 0, 64), "has_residual": True},
    "three weights": {"sizes": (24, 8, 1), "has_norm": True},
    "residual": {"shape": (2, 3, 64), "has_residual": True},
    "gated": {"sizes": (24, 24), "has_norm": True, "has_residual": True, "is_gated": True},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", LINEAR_CASES)
def test_linear(device, dtype, case):
    problem = make_linear(dtype=dtype, device=device, **LINEAR_CASES[case])
    opcheck(torch.ops.flashcore.linear.default, problem.arguments())


@pytest.mark.parametrize("num_rows", [1, 5])
def test_linear_layouts(device, num_rows):
    columns_first = torch.randn(64, num_rows, 2, device=device).permute(1, 2, 0)
    opcheck(torch.ops.flashcore.linear.default, (columns_first, [torch.randn(24, 64, device=device)]))
