"""append_kv_ on every device, bit by bit against the reference."""

from __future__ import annotations

import pytest
import torch

from flashcore_ops import append_kv_, reference


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("positions_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("num_tokens", [0, 1, 5, 20])
def test_equals_reference(device, dtype, positions_dtype, num_tokens):
    key_cache = torch.full((4, 2, 12, 24), 7.0, dtype=dtype, device=device)
    value_cache = torch.full((4, 12, 2, 40), 7.0, dtype=dtype, device=device).transpose(1, 2)
    key = torch.randn(4, num_tokens, 2, 24, dtype=dtype, device=device).transpose(1, 2)
    value = torch.randn(4, 2, num_tokens, 40, dtype=dtype, device=device)
    # Inside, across the end, across the beginning, and far outside.
    positions = torch.tensor([3, 10, -2, 1000], dtype=positions_dtype, device=device)
    expected = key_cache.clone(), value_cache.clone()
    reference.append_kv_(*expected, key, value, positions)
    append_kv_(key_cache, value_cache, key, value, positions)
    assert torch.equal(key_cache, expected[0])
    assert torch.equal(value_cache, expected[1])


@pytest.mark.parametrize("position", [2**31 - 1, -(2**31), 2**63 - 1, -(2**63)])
def test_extreme_positions_write_nothing(device, position):
    key_cache, value_cache = torch.zeros(1, 1, 8, 16, device=device), torch.zeros(1, 1, 8, 16, device=device)
    token = torch.ones(1, 1, 3, 16, device=device)
    append_kv_(key_cache, value_cache, token, token.clone(), torch.tensor([position], device=device))
    assert (key_cache == 0).all()
    assert (value_cache == 0).all()


def test_bumps_the_version_counter(device):
    key_cache, value_cache = torch.zeros(1, 1, 8, 16, device=device), torch.zeros(1, 1, 8, 16, device=device)
    token = torch.ones(1, 1, 1, 16, device=device)
    before = key_cache._version, value_cache._version
    append_kv_(key_cache, value_cache, token, token.clone(), torch.tensor([0], device=device))
    assert key_cache._version > before[0]
    assert value_cache._version > before[1]


def test_works_on_inference_tensors(device):
    with torch.inference_mode():
        key_cache, value_cache = torch.zeros(1, 1, 8, 16, device=device), torch.zeros(1, 1, 8, 16, device=device)
        token = torch.ones(1, 1, 1, 16, device=device)
        append_kv_(key_cache, value_cache, token, token.clone(), torch.tensor([4], device=device))
    assert key_cache[0, 0, :, 0].tolist() == [0, 0, 0, 0, 1, 0, 0, 0]
