"""Properties over random shapes, strides and options: the oracle's answer, and laws that need no oracle."""

from __future__ import annotations

import pytest

pytest.importorskip("hypothesis")

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashcore_ops import append_kv_, attention, attention_with_lse, linear, reference
from tests.linear_problems import assert_linear_as_accurate_as_pytorch, make_linear
from tests.problems import Problem, assert_as_accurate_as_pytorch, make_problem

head_dims = st.sampled_from([16, 24, 32, 40, 64, 80])


@st.composite
def problems(draw: st.DrawFn, device: str) -> Problem:
    num_kv_heads = draw(st.integers(1, 3))
    batch, kv_len = draw(st.integers(1, 3)), draw(st.integers(0, 90))
    query_len = draw(st.integers(1, 40) | st.just(max(1, kv_len)))
    is_causal = draw(st.booleans())
    bound = st.integers(-5, kv_len + 5)
    torch.manual_seed(draw(st.integers(0, 2**16)))
    problem = make_problem(
        batch=batch,
        num_query_heads=num_kv_heads * draw(st.integers(1, 7)),
        num_kv_heads=num_kv_heads,
        query_len=query_len,
        kv_len=kv_len,
        head_dim=draw(head_dims),
        value_dim=draw(head_dims),
        dtype=draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16])),
        device=device,
        kv_range=draw(st.none() | st.lists(st.tuples(bound, bound), min_size=batch, max_size=batch)),
        has_sinks=draw(st.booleans()),
        scale=draw(st.sampled_from([None, 0.0, -0.3, 1.5]) | st.floats(-2, 2)),
        is_causal=is_causal,
        window=draw(st.integers(0, 60)) if is_causal else 0,
        softcap=draw(st.sampled_from([0.0, 0.5, 20.0])),
    )
    return draw(st.sampled_from([problem, head_major(problem), problem.inside_larger()]))


def head_major(problem: Problem) -> Problem:
    return Problem(
        problem.query.contiguous(), problem.key.contiguous(), problem.value.contiguous(), *problem.arguments()[3:]
    )


def examples(device: str, on_cpu: int) -> settings:
    """On a GPU nearly every example compiles kernels of its own, so there are fewer."""
    return settings(max_examples=on_cpu if device == "cpu" else on_cpu // 5, deadline=None, derandomize=True)


def test_attention_equals_the_oracle(device):
    @examples(device, on_cpu=150)
    @given(problems(device), st.integers(0, 9))
    def check(problem: Problem, num_splits: int) -> None:
        output, lse = attention_with_lse(*problem.arguments(), num_splits=num_splits)
        assert_as_accurate_as_pytorch(output, lse, problem)
        if device == "cpu":
            assert_as_accurate_as_pytorch(attention(*problem.arguments()), None, problem)

    check()


def test_batches_do_not_mix(device):
    """Every batch entry alone gives what it gives in the batch, up to the last bit of the output."""

    @examples(device, on_cpu=50)
    @given(problems(device))
    def check(problem: Problem) -> None:
        output = attention(*problem.arguments(), num_splits=1)
        for row in range(problem.query.shape[0]):
            one = slice(row, row + 1)
            alone = attention(
                problem.query[one],
                problem.key[one],
                problem.value[one],
                None if problem.kv_range is None else problem.kv_range[one],
                *problem.arguments()[4:],
                num_splits=1,
            )
            bound = 4 * torch.finfo(output.dtype).eps
            torch.testing.assert_close(alone, output[one], rtol=bound, atol=bound)

    check()


def test_append_equals_the_reference(device):
    size = st.integers(0, 4)

    @examples(device, on_cpu=80)
    @given(size, size, size, size, head_dims, head_dims, st.data())
    def check(batch, num_heads, kv_len, num_tokens, head_dim, value_dim, data) -> None:
        caches = [torch.randn(batch, num_heads, kv_len, dim, device=device) for dim in (head_dim, value_dim)]
        tokens = [torch.randn(batch, num_heads, num_tokens, cache.shape[3], device=device) for cache in caches]
        bound = st.integers(-6, kv_len + 6)
        rows = data.draw(st.lists(bound, min_size=batch, max_size=batch))
        positions = torch.tensor(rows, dtype=torch.int32, device=device)
        expected = [cache.clone() for cache in caches]
        reference.append_kv_(*expected, *tokens, positions)
        append_kv_(*caches, *tokens, positions)
        assert all(torch.equal(cache, other) for cache, other in zip(caches, expected, strict=True))

    check()


def test_linear_equals_the_oracle(device):
    leading_dims = st.lists(st.integers(0, 6), max_size=3)
    some_sizes = st.lists(st.integers(1, 200), min_size=1, max_size=3)

    @examples(device, on_cpu=60)
    @given(leading_dims, st.integers(1, 700), some_sizes, st.data())
    def check(leading, depth, sizes, data) -> None:
        is_gated = data.draw(st.booleans())
        torch.manual_seed(data.draw(st.integers(0, 2**16)))
        problem = make_linear(
            (*leading, depth),
            sizes=(sizes[0], sizes[0]) if is_gated else tuple(sizes),
            dtype=data.draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16])),
            device=device,
            has_norm=data.draw(st.booleans()),
            eps=data.draw(st.sampled_from([0.0, 1e-6, 1.0])),
            has_residual=data.draw(st.booleans()),
            is_gated=is_gated,
        )
        problem = data.draw(st.sampled_from([problem, problem.with_offset()]))
        assert_linear_as_accurate_as_pytorch(linear(*problem.arguments()), problem)

    check()
