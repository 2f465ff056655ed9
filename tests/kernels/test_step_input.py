"""The kernel that a decode step begins with, against what transformers computes."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from csrc_free_kernels.step_input import step_input
from tests.kernels.conftest import IS_INTERPRETED
from tests.kernels.launches import is_dependent

# The interpreter truncates casts to bfloat16.
DTYPES = [torch.float32, torch.float16] if IS_INTERPRETED else [torch.float32, torch.float16, torch.bfloat16]


@dataclass(frozen=True)
class StepInput:
    hidden: Tensor
    cos: Tensor
    sin: Tensor
    kv_range: Tensor


def launch(
    tokens: list[int], starts: list[int], offsets: list[int], length: int, *, embedding: Tensor, inv_freq: Tensor
) -> StepInput:
    batch, device, dtype = len(tokens), embedding.device, embedding.dtype
    result = StepInput(
        hidden=torch.full((batch, 1, embedding.shape[1]), torch.inf, dtype=dtype, device=device),
        cos=torch.full((batch, 1, 2 * len(inv_freq)), torch.nan, dtype=dtype, device=device),
        sin=torch.full((batch, 1, 2 * len(inv_freq)), torch.nan, dtype=dtype, device=device),
        kv_range=torch.full((batch, 2), -7, dtype=torch.int32, device=device),
    )
    step_input(
        torch.tensor(tokens, device=device)[:, None],
        torch.tensor(starts, dtype=torch.int32, device=device),
        torch.tensor(offsets, device=device),
        torch.tensor(length, device=device),
        embedding=embedding,
        inv_freq=inv_freq,
        attention_scaling=1.25,
        **vars(result),
        is_dependent=is_dependent(device),
    )
    return result


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("width", "num_frequencies"), [(64, 32), (112, 8), (100, 40)])
def test_each_row_has_its_own_token_start_and_position(
    kernel_device: str, dtype: torch.dtype, width: int, num_frequencies: int
) -> None:
    embedding = torch.randn(96, width, dtype=dtype, device=kernel_device)
    inv_freq = 10_000.0 ** -(torch.arange(num_frequencies, device=kernel_device) / num_frequencies)
    tokens, starts, offsets = [5, 0, 95], [0, 3, 7], [0, 3, -20]
    result = launch(tokens, starts, offsets, 1000, embedding=embedding, inv_freq=inv_freq)
    assert torch.equal(result.hidden[:, 0], embedding[tokens])
    assert result.kv_range.tolist() == [[0, 1001], [3, 1001], [7, 1001]]
    positions = torch.tensor([1000.0, 997.0, 1020.0], device=kernel_device)
    angle = (positions[:, None, None] * inv_freq).repeat(1, 1, 2)
    rounding = torch.finfo(dtype).eps
    for actual, expected in ((result.cos, angle.cos() * 1.25), (result.sin, angle.sin() * 1.25)):
        torch.testing.assert_close(actual.float(), expected, rtol=rounding, atol=1e-6)


def test_large_angles_keep_their_precision(kernel_device: str) -> None:
    embedding = torch.randn(8, 64, device=kernel_device)
    result = launch([1], [0], [0], 131_071, embedding=embedding, inv_freq=torch.ones(32, device=kernel_device))
    expected = torch.tensor(131_071.0, dtype=torch.float64)
    assert result.cos[0, 0, 0].item() == pytest.approx(expected.cos().item() * 1.25, abs=1e-6)
    assert result.sin[0, 0, 0].item() == pytest.approx(expected.sin().item() * 1.25, abs=1e-6)


@pytest.mark.parametrize("token", [-1, 8, 2**40])
def test_a_token_outside_the_vocabulary_is_nan(kernel_device: str, token: int) -> None:
    embedding = torch.randn(8, 64, device=kernel_device)
    inv_freq = torch.ones(32, device=kernel_device)
    result = launch([token, 3], [0, 0], [0, 0], 4, embedding=embedding, inv_freq=inv_freq)
    assert result.hidden[0].isnan().all()
    assert torch.equal(result.hidden[1, 0], embedding[3])
