"""The attention ops on every device, against the float64 reference by the twice-PyTorch bar."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flashcore_ops import attention, attention_with_lse
from tests.problems import DTYPES, Problem, assert_as_accurate_as_pytorch, make_problem


def check(problem: Problem, num_splits: int = 0) -> None:
    output, lse = attention_with_lse(*problem.arguments(), num_splits=num_splits)
    assert_as_accurate_as_pytorch(output, lse, problem)
    if output.device.type == "cpu":
        # A path of its own on the CPU; on a GPU the same kernel, compiled once more.
        assert_as_accurate_as_pytorch(attention(*problem.arguments()), None, problem)


HEAD_DIMS = [16, 24, 64, 80, 96, 112, 128, 160, 192, 256]
# The 16-bit types share their tiles: every head dim in one of them, a few in the other.
HEAD_DIMS_OF = {torch.bfloat16: HEAD_DIMS, torch.float16: [24, 64, 128], torch.float32: [16, 24, 64, 96, 128, 160, 256]}


@pytest.mark.parametrize("query_len", [1, 16, 130])
@pytest.mark.parametrize(("dtype", "head_dim"), [(dtype, dim) for dtype in DTYPES for dim in HEAD_DIMS_OF[dtype]])
def test_head_dims(device, dtype, query_len, head_dim):
    problem = make_problem(query_len=query_len, kv_len=203, head_dim=head_dim, dtype=dtype, device=device)
    assert_as_accurate_as_pytorch(attention(*problem.arguments()), None, problem)


@pytest.mark.parametrize(("num_query_heads", "num_kv_heads"), [(1, 1), (4, 4), (8, 1), (7, 1), (14, 2), (9, 3)])
@pytest.mark.parametrize("query_len", [1, 2, 19])
def test_head_ratios(device, num_query_heads, num_kv_heads, query_len):
    check(
        make_problem(
            num_query_heads=num_query_heads,
            num_kv_heads=num_kv_heads,
            query_len=query_len,
            kv_len=77,
            head_dim=64,
            dtype=torch.float16,
            device=device,
        )
    )


# bfloat16 takes float16's path: test_head_dims and test_properties.py cover it.
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("query_len", [1, 5, 40, 133])
@pytest.mark.parametrize(
    "options",
    [
        {"kv_range": [(0, 100), (37, 90)]},
        {"kv_range": [(0, 2), (50, 50)]},
        {"kv_range": [(-5, 1000), (120, 60)]},
        {"is_causal": False},
        {"is_causal": False, "kv_range": [(10, 100), (0, 1)]},
        {"window": 1},
        {"window": 30},
        {"window": 30, "kv_range": [(80, 100), (0, 64)]},
        {"window": 2**31 - 1},
        {"softcap": 0.5},
        {"softcap": 30.0, "window": 17},
        {"has_sinks": True},
        {"has_sinks": True, "kv_range": [(0, 3), (99, 99)], "softcap": 5.0, "window": 9},
        {"scale": 0.0},
        {"scale": -0.3},
        {"value_dim": 64},
        {"value_dim": 24},
    ],
    ids=lambda options: "-".join(options),
)
def test_options(device, dtype, query_len, options):
    check(make_problem(query_len=query_len, kv_len=133, dtype=dtype, device=device, **options))


@pytest.mark.parametrize("dtype", DTYPES)
def test_sinks_in_the_querys_dtype(device, dtype):
    problem = make_problem(dtype=dtype, device=device, has_sinks=True)
    sinks = problem.sinks.to(dtype)
    output = attention(problem.query, problem.key, problem.value, sinks=sinks)
    expected = attention(problem.query, problem.key, problem.value, sinks=sinks.float())
    assert torch.equal(output, expected)


@pytest.mark.parametrize(
    ("batch", "query_len", "kv_len"),
    [(0, 3, 5), (2, 0, 5), (2, 3, 0), (2, 1, 0), (2, 20, 0), (2, 0, 0), (1, 1, 1), (1, 20, 1), (1, 64, 64)],
)
def test_empty_and_tiny(device, batch, query_len, kv_len):
    problem = make_problem(batch=batch, query_len=query_len, kv_len=kv_len, device=device)
    check(problem)
    output, lse = attention_with_lse(*problem.arguments())
    if kv_len == 0:
        assert (output == 0).all()
        assert torch.isneginf(lse).all()


@pytest.mark.parametrize("query_len", [1, 18])
def test_any_strides_with_a_contiguous_last_dim(device, query_len):
    contiguous = make_problem(query_len=query_len, kv_len=50, device=device)
    wide = torch.randn(2, 2, 50, 96, device=device)
    views = Problem(
        query=contiguous.query.contiguous(),
        key=wide[..., :32],
        value=wide[..., 40:72],
        kv_range=torch.tensor([[0, 7], [5, 50], [9, 9], [1, 45]], dtype=torch.int32, device=device)[1::2],
    )
    assert views.kv_range is not None
    assert not views.kv_range.is_contiguous()
    check(views)
    shared = Problem(
        query=contiguous.query,
        key=contiguous.key[:1].expand(2, -1, -1, -1),
        value=contiguous.value[:1, :1].expand(2, 2, -1, -1),
    )
    check(shared)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("query_len", [16, 130])
@pytest.mark.parametrize("kv_len", [26, 200])
@pytest.mark.parametrize("head_dim", [40, 128, 256])
def test_views_that_no_wide_load_can_serve(device, dtype, query_len, kv_len, head_dim):
    """Odd strides and offsets: tiles go through registers instead of asynchronous copies."""
    options = {"is_causal": False, "softcap": 20.0, "value_dim": 32}
    problem = make_problem(query_len=query_len, kv_len=kv_len, head_dim=head_dim, dtype=dtype, device=device, **options)
    check(problem.inside_larger())


def test_output_is_stored_token_major(device):
    problem = make_problem(batch=3, num_query_heads=6, num_kv_heads=3, query_len=4, value_dim=40, device=device)
    output = attention(*problem.arguments())
    assert output.shape == (3, 6, 4, 40)
    assert output.transpose(1, 2).is_contiguous()
    fake = torch.ops.flashcore.attention(*(tensor.to("meta") for tensor in (problem.query, problem.key, problem.value)))
    assert fake.stride() == output.stride()


@pytest.mark.parametrize("query_len", [1, 6, 48])
def test_partial_results_merge(device, query_len):
    problem = make_problem(batch=1, query_len=query_len, kv_len=90, has_sinks=True, is_causal=False, device=device)
    pieces = []
    for low, high, sinks in [(0, 20, None), (20, 21, problem.sinks), (21, 90, None)]:
        kv_range = torch.tensor([[low, high]], dtype=torch.int32, device=device)
        pieces.append(
            attention_with_lse(
                problem.query, problem.key, problem.value, kv_range=kv_range, is_causal=False, sinks=sinks
            )
        )
    lse = torch.stack([piece_lse for _, piece_lse in pieces])
    weights = torch.softmax(lse, dim=0)[..., None]
    merged = sum(weight * output for weight, (output, _) in zip(weights, pieces, strict=True))
    expected, expected_lse = attention_with_lse(*problem.arguments())
    torch.testing.assert_close(merged, expected, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(torch.logsumexp(lse, dim=0), expected_lse, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("num_splits", [1, 2, 5, 7, 64, 10_000])
@pytest.mark.parametrize("query_len", [1, 4])
def test_num_splits_is_an_upper_bound_at_any_length(device, num_splits, query_len):
    options = {"kv_range": [(0, 300), (290, 300), (0, 1)], "has_sinks": True}
    check(make_problem(batch=3, query_len=query_len, kv_len=301, device=device, **options), num_splits=num_splits)


@pytest.mark.parametrize("query_len", [1, 9, 100])
def test_results_repeat_bitwise(device, query_len):
    problem = make_problem(query_len=query_len, kv_len=500, head_dim=64, dtype=torch.float16, device=device)
    first, first_lse = attention_with_lse(*problem.arguments())
    for _ in range(5):
        output, lse = attention_with_lse(*problem.arguments())
        assert torch.equal(output, first)
        assert torch.equal(lse, first_lse)


@pytest.mark.parametrize("query_len", [1, 40])
def test_sinks_of_any_stride(device, query_len):
    problem = make_problem(query_len=query_len, device=device)
    strided = replace(problem, sinks=torch.randn(8, device=device)[::2])
    expanded = replace(problem, sinks=torch.randn(1, device=device).expand(4))
    for views in (strided, expanded):
        check(views)


@pytest.mark.parametrize("query_len", [9, 40])
def test_a_window_past_int32_is_no_window(device, query_len):
    """More rows than slots, where the first columns are negative."""
    problem = make_problem(query_len=query_len, kv_len=3, device=device)
    for window in (2**31 - 1, 2**40):
        assert torch.equal(attention(*replace(problem, window=window).arguments()), attention(*problem.arguments()))


@pytest.mark.parametrize("query_len", [1, 20, 33])
def test_a_scale_past_float32_picks_the_largest_score(device, query_len):
    problem = make_problem(query_len=query_len, kv_len=33, num_query_heads=2, is_causal=False, device=device)
    best = (problem.query @ problem.key.transpose(2, 3)).argmax(dim=3)
    expected = problem.value.gather(2, best[..., None].expand(-1, -1, -1, 32))
    assert torch.equal(attention(*replace(problem, scale=1e300).arguments()), expected)


@pytest.mark.parametrize("query_len", [1, 33])
def test_large_scores_do_not_overflow(device, query_len):
    problem = make_problem(query_len=query_len, scale=100.0, device=device)
    check(problem)
