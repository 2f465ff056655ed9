"""The append kernel, bit by bit against the reference."""

from __future__ import annotations

import pytest
import torch

from csrc_free_kernels import kv_append
from flashcore_ops import reference
from tests.kernels.conftest import KERNEL_DTYPES


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("num_tokens", [1, 3])
@pytest.mark.parametrize("positions_dtype", [torch.int32, torch.int64])
def test_equals_reference(kernel_device, dtype, num_tokens, positions_dtype):
    caches = [torch.full((4, 2, 9, dim), 7.0, dtype=dtype, device=kernel_device) for dim in (24, 32)]
    tokens = [torch.randn(4, num_tokens, 2, dim, dtype=dtype, device=kernel_device).transpose(1, 2) for dim in (24, 32)]
    positions = torch.tensor([4, 7, -1, 9], dtype=positions_dtype, device=kernel_device)
    expected = [cache.clone() for cache in caches]
    reference.append_kv_(*expected, *tokens, positions)
    kv_append.append_kv_(*caches, *tokens, positions)
    assert torch.equal(caches[0], expected[0])
    assert torch.equal(caches[1], expected[1])
