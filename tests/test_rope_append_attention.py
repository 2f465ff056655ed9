"""rope_append_attention on every device: the output against the float64 reference, the caches bit by bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flashcore_ops import append_kv_, attention, reference, rope_append_attention
from tests.problems import DTYPES
from tests.rope_problems import (
    RopeProblem,
    assert_appended,
    assert_output_as_accurate_as_pytorch,
    bits,
    make_rope_problem,
)


def check(problem: RopeProblem, num_splits: int = 0) -> None:
    after = problem.with_own_caches()
    output = rope_append_attention(*after.arguments(), num_splits=num_splits)
    assert_output_as_accurate_as_pytorch(output, problem)
    # A GPU rotates with fused multiply-adds.
    is_exact = problem.query.device.type == "cpu"
    assert_appended(problem, after, reference.rotate(problem.key, problem.cos, problem.sin) if is_exact else None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [16, 24, 64, 80, 128, 256])
def test_head_dims(device, dtype, head_dim):
    check(make_rope_problem(kv_len=203, head_dim=head_dim, dtype=dtype, device=device))


@pytest.mark.parametrize(("num_query_heads", "num_kv_heads"), [(1, 1), (4, 4), (7, 1), (9, 3), (71, 1)])
def test_head_ratios(device, num_query_heads, num_kv_heads):
    check(
        make_rope_problem(
            num_query_heads=num_query_heads,
            num_kv_heads=num_kv_heads,
            kv_len=77,
            head_dim=64,
            dtype=torch.float16,
            device=device,
        )
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"kv_range": [(0, 1), (37, 90)]},
        {"kv_range": [(-5, 133), (50, 50)]},
        {"kv_range": [(120, 60), (132, 133)], "is_rotation_shared": True},
        {"window": 1},
        {"window": 30, "kv_range": [(80, 100), (0, 64)]},
        {"window": 2**40},
        {"softcap": 0.5},
        {"softcap": 30.0, "window": 17, "has_sinks": True},
        {"has_sinks": True, "kv_range": [(0, 3), (99, 99)]},
        {"scale": 0.0},
        {"scale": -0.3},
        {"value_dim": 64},
        {"value_dim": 24},
    ],
    ids=lambda options: "-".join(options),
)
def test_options(device, dtype, options):
    check(make_rope_problem(kv_len=133, dtype=dtype, device=device, **options))


@pytest.mark.parametrize("num_splits", [1, 2, 5, 64, 10_000])
def test_num_splits_is_an_upper_bound_at_any_length(device, num_splits):
    options = {"kv_range": [(0, 300), (290, 300), (0, 1)], "has_sinks": True}
    check(make_rope_problem(batch=3, kv_len=301, device=device, **options), num_splits=num_splits)


@pytest.mark.parametrize("num_splits", [0, 1, 4])
@pytest.mark.parametrize("options", [{}, {"softcap": 3.0}, {"has_sinks": True, "window": 9}], ids=str)
def test_rows_without_a_slot_are_nan_and_write_nothing(device, num_splits, options):
    ends = [98, 2**31 - 1, 0, -1, -(2**31), 97]
    kv_range = [(3, end) for end in ends]
    problem = make_rope_problem(batch=len(ends), kv_len=97, device=device, kv_range=kv_range, **options)
    check(problem, num_splits)
    after = problem.with_own_caches()
    output = rope_append_attention(*after.arguments(), num_splits=num_splits)
    assert output[:5].isnan().all()
    assert output[5].isfinite().all()
    assert torch.equal(bits(after.key_cache[:5]), bits(problem.key_cache[:5]))


@pytest.mark.parametrize(("batch", "kv_len"), [(0, 5), (2, 0), (1, 1)])
def test_empty_and_tiny(device, batch, kv_len):
    check(make_rope_problem(batch=batch, kv_len=kv_len, device=device, kv_range=[(0, 1)] * batch))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_rotation_append_and_attention_one_after_the_other(device, dtype):
    """A decode loop of 20 steps from an empty cache, with left padding."""
    problem = make_rope_problem(kv_len=20, head_dim=64, dtype=dtype, device=device)
    fused = [torch.full_like(cache, torch.nan) for cache in (problem.key_cache, problem.value_cache)]
    parts = [cache.clone() for cache in fused]
    for end in range(1, 21):
        step = make_rope_problem(kv_len=20, head_dim=64, dtype=dtype, device=device, kv_range=[(0, end), (3, end)])
        output = rope_append_attention(*replace(step, key_cache=fused[0], value_cache=fused[1]).arguments())
        query, key = (reference.rotate(x, step.cos, step.sin) for x in (step.query, step.key))
        append_kv_(*parts, key, step.value, positions=step.kv_range[:, 1] - 1)
        if device == "cpu":
            assert torch.equal(output, attention(query, *parts, kv_range=step.kv_range))
            assert all(torch.equal(bits(a), bits(b)) for a, b in zip(fused, parts, strict=True))
    filled = RopeProblem(*step.arguments()[:5], *parts, step.kv_range)
    assert_output_as_accurate_as_pytorch(output, filled)


def test_strides(device):
    """Caches stored token-major inside larger ones, a strided range, sinks and cos of any stride."""
    problem = make_rope_problem(kv_len=40, has_sinks=True, device=device, kv_range=[(0, 31), (4, 40)])
    larger = [torch.full((3, 50, 4, 48), torch.nan, device=device).transpose(1, 2) for _ in range(2)]
    key_cache, value_cache = (
        cache[1:, 1:3, 5:45, 8:40].copy_(own)
        for cache, own in zip(larger, (problem.key_cache, problem.value_cache), strict=True)
    )
    views = replace(
        problem,
        key_cache=key_cache,
        value_cache=value_cache,
        cos=torch.cat([problem.cos, problem.cos], dim=-1)[..., :32],
        kv_range=torch.stack([problem.kv_range, problem.kv_range], dim=1).flatten(0, 1)[::2],
        sinks=problem.sinks.repeat_interleave(2)[::2],
    )
    output = rope_append_attention(*views.arguments())
    assert_output_as_accurate_as_pytorch(output, problem)
    assert all(torch.isnan(cache[0]).all() and torch.isnan(cache[:, 3]).all() for cache in larger)
    packed = problem.with_own_caches()
    assert torch.equal(rope_append_attention(*packed.arguments()), output)
    assert torch.equal(bits(packed.key_cache), bits(key_cache))
    assert torch.equal(bits(packed.value_cache), bits(value_cache))


def test_output_layout(device):
    problem = make_rope_problem(batch=3, num_query_heads=6, num_kv_heads=3, value_dim=40, device=device)
    output = rope_append_attention(*problem.arguments())
    assert output.shape == (3, 6, 1, 40)
    assert output.transpose(1, 2).is_contiguous()
    meta = (each.to("meta") if isinstance(each, torch.Tensor) else each for each in problem.arguments())
    assert torch.ops.flashcore.rope_append_attention(*meta).stride() == output.stride()


def test_results_repeat_bitwise(device):
    problem = make_rope_problem(kv_len=500, head_dim=64, dtype=torch.float16, device=device)
    first = rope_append_attention(*problem.with_own_caches().arguments())
    for _ in range(5):
        assert torch.equal(rope_append_attention(*problem.with_own_caches().arguments()), first)


def test_bumps_the_version_counter(device):
    problem = make_rope_problem(device=device)
    before = problem.key_cache._version, problem.value_cache._version
    rope_append_attention(*problem.arguments())
    assert problem.key_cache._version > before[0]
    assert problem.value_cache._version > before[1]


def test_works_on_inference_tensors(device):
    with torch.inference_mode():
        check(make_rope_problem(device=device))


def test_compiled_steps_change_the_callers_caches(device):
    """Functionalisation turns the mutation into copies and back: the caches must have it, at every step."""
    torch._dynamo.reset()

    @torch.compile(backend="aot_eager", fullgraph=True)
    def two_layers(first: RopeProblem, second: RopeProblem) -> torch.Tensor:
        output = rope_append_attention(*first.arguments())
        return rope_append_attention(output, *second.arguments()[1:])

    first, second = (make_rope_problem(kv_len=12, device=device, kv_range=[(0, 6), (2, 6)]) for _ in range(2))
    compiled, eager = ([each.with_own_caches() for each in (first, second)] for _ in range(2))
    for end in range(6, 14):
        kv_range = torch.tensor([[0, end], [2, end]], dtype=torch.int32, device=device)
        compiled, eager = ([replace(each, kv_range=kv_range) for each in pair] for pair in (compiled, eager))
        expected = rope_append_attention(rope_append_attention(*eager[0].arguments()), *eager[1].arguments()[1:])
        torch.testing.assert_close(two_layers(*compiled), expected, rtol=0, atol=0, equal_nan=True)
        assert expected.isnan().all() == (end > 12)
        for actual, wanted in zip(compiled, eager, strict=True):
            assert torch.equal(bits(actual.key_cache), bits(wanted.key_cache))
            assert torch.equal(bits(actual.value_cache), bits(wanted.value_cache))
