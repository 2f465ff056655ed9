"""The argmax kernels against numpy's, which takes the first among equals."""

from __future__ import annotations

import pytest
import torch

from csrc_free_kernels.argmax import argmax
from tests.kernels.conftest import KERNEL_DTYPES
from tests.kernels.launches import is_dependent


def launch(logits: torch.Tensor) -> torch.Tensor:
    tokens = torch.full((logits.shape[0], 1), -1, device=logits.device)
    argmax(logits, tokens, is_dependent=is_dependent(logits.device))
    return tokens


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", [1, 7, 96, 2047, 2048, 2050, 49152])
def test_the_first_among_equals(kernel_device: str, dtype: torch.dtype, vocab_size: int) -> None:
    logits = torch.randint(-50, 0, (3, vocab_size), device=kernel_device).to(dtype)
    expected = torch.from_numpy(logits.float().cpu().numpy().argmax(axis=-1, keepdims=True))
    assert torch.equal(launch(logits).cpu(), expected)


@pytest.mark.parametrize("where", [0, 17, 2048, 4999])
def test_one_row_of_a_larger_tensor(kernel_device: str, where: int) -> None:
    logits = torch.randn(4, 3, 5000, device=kernel_device)
    logits[:, 1, where] = 100.0
    assert launch(logits[:, 1]).tolist() == [[where]] * 4


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_rows_without_a_finite_number_give_an_index(kernel_device: str, value: float) -> None:
    assert launch(torch.full((2, 3000), value, device=kernel_device)).tolist() == [[0], [0]]
