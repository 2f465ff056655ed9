"""The linear op on every device: the twice-PyTorch bar, transformers' own bits on the CPU, and laws of its rows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import product

import pytest
import torch

from flashcore_ops import linear
from tests.linear_problems import LinearProblem, assert_linear_as_accurate_as_pytorch, make_linear
from tests.problems import DTYPES

HALF_DTYPES = [torch.float16, torch.bfloat16]
OPTIONS = [
    {"has_norm": has_norm, "has_residual": has_residual, "is_gated": is_gated}
    for has_norm, has_residual, is_gated in product((False, True), repeat=3)
]


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Whatever is allocated inside is NaN until it is written."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(1).isnan()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def check(problem: LinearProblem) -> None:
    with poisoned_memory():
        output = linear(*problem.arguments())
    assert output.dtype == problem.input.dtype
    assert_linear_as_accurate_as_pytorch(output, problem)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("num_rows", "depth"),
    [*product((1, 5), (1, 8, 16, 570, 576, 577, 1536, 4096, 14336)), *product((2, 32, 33, 100), (16, 570))],
)
def test_rows_and_depths(device, dtype, num_rows, depth):
    check(make_linear((num_rows, depth), sizes=(20, 7), dtype=dtype, device=device))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("num_rows", [1, 9])
@pytest.mark.parametrize(
    "sizes", [(1,), (7,), (64,), (1000,), (64, 7), (1, 1000), (64, 7, 1), (7, 64, 64), (1000, 64, 7)], ids=str
)
def test_sizes(device, dtype, num_rows, sizes):
    check(make_linear((num_rows, 576), sizes=sizes, dtype=dtype, device=device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_rows", "depth"), [(1, 576), (1, 8200), (40, 576)])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options(device, dtype, num_rows, depth, options):
    check(make_linear((num_rows, depth), sizes=(70, 70), dtype=dtype, device=device, **options))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("num_rows", [1, 3])
@pytest.mark.parametrize("eps", [0.0, 1e-5, 2.0])
def test_eps(device, dtype, num_rows, eps):
    problem = make_linear((num_rows, 64), dtype=dtype, device=device, has_norm=True, eps=eps)
    # Small enough for 1e-5 to weigh as much as the mean square.
    check(replace(problem, input=problem.input * 3e-3))


@pytest.mark.parametrize("num_rows", [1, 3])
def test_large_gates_do_not_overflow(device, num_rows):
    problem = make_linear((num_rows, 64), sizes=(24, 24), device=device, is_gated=True)
    problem = replace(problem, weights=[problem.weights[0] * 1e4, problem.weights[1]])
    assert_linear_as_accurate_as_pytorch(linear(*problem.arguments()), problem)


@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
@pytest.mark.parametrize("num_rows", [1, 3])
def test_what_the_norm_brings_into_range_does_not_overflow(device, dtype, num_rows):
    problem = make_linear((num_rows, 576), sizes=(24,), dtype=dtype, device=device, has_norm=True)
    check(replace(problem, input=problem.input * 1e4, norm_weight=problem.norm_weight * 100))


@pytest.mark.parametrize("shape", [(64,), (1, 64), (2, 3, 64), (2, 1, 3, 64), (0, 64), (2, 0, 64)], ids=str)
@pytest.mark.parametrize("is_gated", [False, True])
def test_leading_dims(device, shape, is_gated):
    check(make_linear(shape, sizes=(24, 24), device=device, has_norm=True, has_residual=True, is_gated=is_gated))


@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("layout", ["attention", "last token", "every other column", "columns first", "expanded"])
def test_layouts_of_the_input(device, dtype, batch, layout):
    depth = 64
    if layout == "attention":
        heads = torch.randn(batch, 1, 4, depth // 4, dtype=dtype, device=device).transpose(1, 2)
        rows = heads.transpose(1, 2).reshape(batch, 1, depth)
    elif layout == "last token":
        rows = torch.randn(batch, 5, depth, dtype=dtype, device=device)[:, -1:]
    elif layout == "every other column":
        rows = torch.randn(batch, 1, 2 * depth, dtype=dtype, device=device)[..., ::2]
    elif layout == "columns first":
        rows = torch.randn(depth, batch, 3, dtype=dtype, device=device).permute(1, 2, 0)
    else:
        rows = torch.randn(1, 1, depth, dtype=dtype, device=device).expand(batch, 3, depth)
    problem = make_linear(tuple(rows.shape), sizes=(depth,), dtype=dtype, device=device, has_norm=True)
    # A model passes one tensor as both.
    check(replace(problem, input=rows, residual=rows))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_rows", [1, 8])
@pytest.mark.parametrize("sizes", [(40, 40), (4096, 4096)], ids=str)
def test_constant_weights_change_nothing(device, dtype, num_rows, sizes):
    problem = make_linear((num_rows, 4160), sizes=sizes, dtype=dtype, device=device, has_norm=True, is_gated=True)
    promised = replace(problem, has_constant_weights=True)
    assert torch.equal(linear(*promised.arguments()), linear(*problem.arguments()))


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [1, 8])
def test_weights_that_the_kernel_ahead_writes(num_rows):
    """Without the promise, no weight is read before the work that was queued ahead has ended."""
    x = torch.randn(2048, 2048, dtype=torch.bfloat16, device="cuda")
    weight, row = torch.randn_like(x), torch.randn(num_rows, 2048, dtype=torch.bfloat16, device="cuda")
    for _ in range(100):
        made = linear(x, [weight])
        output = linear(row, [made])
        torch.cuda.synchronize()
        assert torch.equal(output, linear(row, [made]))
        # The next one is made in this memory.
        made.fill_(torch.nan)
        del made


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_rows", [1, 6])
def test_unaligned_memory(device, dtype, num_rows):
    options = {"has_norm": True, "has_residual": True, "is_gated": True}
    check(make_linear((num_rows, 576), sizes=(40, 40), dtype=dtype, device=device, **options).with_offset())


def test_more_rows_than_a_grid_dimension(device):
    check(make_linear((70_000, 8), sizes=(3,), device=device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_rows", [2, 7, 40])
@pytest.mark.parametrize("depth", [570, 576])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_poison_in_a_row_stays_in_it(device, dtype, num_rows, depth, poison):
    options = {"has_norm": True, "has_residual": True, "is_gated": True}
    problem = make_linear((num_rows, depth), sizes=(40, 40), dtype=dtype, device=device, **options)
    clean = linear(*problem.arguments())
    poisoned = problem.input.clone()
    poisoned[1, 17] = poison
    output = linear(*replace(problem, input=poisoned).arguments())
    assert output[1].isnan().all()
    others = torch.arange(num_rows, device=device) != 1
    assert torch.equal(output[others], clean[others])
    assert clean.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_rows", [1, 5, 40])
def test_is_bitwise_repeatable(device, dtype, num_rows):
    problem = make_linear((num_rows, 4096), sizes=(100, 100), dtype=dtype, device=device, has_norm=True, is_gated=True)
    first = linear(*problem.arguments())
    assert all(torch.equal(linear(*problem.arguments()), first) for _ in range(5))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("depth", [570, 4096])
def test_a_row_has_the_same_bits_in_every_batch(dtype, options, depth):
    problem = make_linear((40, depth), sizes=(70, 70), dtype=dtype, device="cuda", **options)
    whole = linear(*problem.arguments())
    # A single 16-bit row has a kernel of its own; float32 rows all have that one.
    for num_rows in (1, 2, 3, 16, 17, 32) if dtype == torch.float32 else (2, 3, 16, 17, 32):
        residual = None if problem.residual is None else problem.residual[:num_rows]
        part = replace(problem, input=problem.input[:num_rows], residual=residual)
        assert torch.equal(linear(*part.arguments()), whole[:num_rows]), num_rows


def test_compiles_into_one_graph_of_any_batch(device):
    torch._dynamo.reset()
    options = {"has_norm": True, "has_residual": True, "is_gated": True}
    compiled = torch.compile(linear, backend="aot_eager", fullgraph=True, dynamic=True)
    for batch in (2, 5, 9):
        arguments = make_linear((batch, 3, 64), sizes=(24, 24), device=device, **options).arguments()
        with torch._dynamo.config.patch(error_on_recompile=batch > 2):
            assert torch.equal(compiled(*arguments), linear(*arguments))


def test_takes_weights_that_require_grad_without_grad_mode(device):
    problem = make_linear(device=device)
    problem.weights[0].requires_grad_()
    with torch.no_grad():
        output = linear(*problem.arguments())
    assert not output.requires_grad
    with torch.inference_mode():
        assert torch.equal(linear(*problem.arguments()), output)
