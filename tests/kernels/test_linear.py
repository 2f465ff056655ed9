"""The linear kernels in the tiles that are shipped, against the float64 reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from csrc_free_kernels.linear_tuning import LinearTiles
from tests.kernels.conftest import IS_INTERPRETED, KERNEL_DTYPES
from tests.kernels.launches import check_linear, launch_linear
from tests.linear_problems import make_linear

# The interpreter truncates the norm kernel's casts to bfloat16 as well, which no output dtype can undo.
NORM_DTYPES = [dtype for dtype in KERNEL_DTYPES if not (IS_INTERPRETED and dtype == torch.bfloat16)]
SMALL_TILES = LinearTiles(block_m=16, block_n=16, block_k=32, num_warps=4, num_stages=2)
# Rows of 16 bits and such a depth take Hopper's kernel on a GPU that has it, unaligned ones the portable kernels.
DEPTHS = [570] if IS_INTERPRETED else [570, 592]
parametrize_dtypes = pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)


@parametrize_dtypes
@pytest.mark.parametrize(
    ("num_rows", "depth"), [(1, 1), (1, 8), (1, 576), (1, 4096), (2, 1), (2, 576), (33, 40), (33, 48)]
)
def test_rows_and_depths(kernel_device, dtype, num_rows, depth):
    check_linear(make_linear((num_rows, depth), sizes=(20, 7), dtype=dtype, device=kernel_device))


@parametrize_dtypes
@pytest.mark.parametrize("is_gated", [False, True])
def test_the_deepest_rows(kernel_device, dtype, is_gated):
    check_linear(make_linear((1, 14336), sizes=(20, 20), dtype=dtype, device=kernel_device, is_gated=is_gated))


@parametrize_dtypes
@pytest.mark.parametrize("num_rows", [1, 3])
@pytest.mark.parametrize("sizes", [(1,), (40,), (1, 40), (16, 7, 1), (33, 1, 34)], ids=str)
@pytest.mark.parametrize("depth", DEPTHS)
def test_sizes(kernel_device, dtype, num_rows, sizes, depth):
    problem = make_linear((num_rows, depth), sizes=sizes, dtype=dtype, device=kernel_device, has_residual=True)
    check_linear(problem)


@pytest.mark.parametrize("dtype", NORM_DTYPES, ids=str)
@pytest.mark.parametrize("num_rows", [1, 3])
@pytest.mark.parametrize(("has_residual", "is_gated"), [(False, True), (True, False), (True, True)])
@pytest.mark.parametrize("eps", [0.0, 2.0])
@pytest.mark.parametrize("depth", DEPTHS)
def test_norm(kernel_device, dtype, num_rows, has_residual, is_gated, eps, depth):
    problem = make_linear(
        (num_rows, depth),
        sizes=(20, 20),
        dtype=dtype,
        device=kernel_device,
        has_norm=True,
        eps=eps,
        has_residual=has_residual,
        is_gated=is_gated,
    )
    check_linear(problem)


@parametrize_dtypes
@pytest.mark.parametrize("num_rows", [16, 17])
def test_tile_edges(kernel_device, dtype, num_rows):
    problem = make_linear(
        (num_rows, 100), sizes=(33, 33), dtype=dtype, device=kernel_device, has_residual=True, is_gated=True
    )
    check_linear(problem, SMALL_TILES)


@parametrize_dtypes
@pytest.mark.parametrize("num_rows", [2, 17])
@pytest.mark.parametrize("depth", DEPTHS)
def test_nan_stays_in_its_row(kernel_device, dtype, num_rows, depth):
    problem = make_linear((num_rows, depth), sizes=(7, 3), dtype=dtype, device=kernel_device, has_norm=True)
    clean = launch_linear(problem)
    poisoned = problem.input.clone()
    poisoned[1, 300] = torch.nan
    output = launch_linear(replace(problem, input=poisoned))
    assert output[1].isnan().all()
    others = torch.arange(num_rows, device=kernel_device) != 1
    assert torch.equal(output[others], clean[others])
    assert clean.isfinite().all()
