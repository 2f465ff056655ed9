"""Kernels that start while the one ahead still changes the range: nothing may be left of what they read too early."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from flashcore_ops import attention, rope_append_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0), reason="needs dependent launches"
    ),
]

KV_LEN, HEAD_DIM = 3000, 128
# More tiles than a program holds, fewer, one, none.
RANGES = [(0, 3000), (0, 1500), (700, 2999), (64, 128), (0, 1), (9, 9)]


@triton.jit
def _change_range(p_range, other_start, other_end, start, end, num_changes):
    """Lets its dependents start, goes back and forth between two ranges, and leaves the one."""
    gdc_launch_dependents()
    for _ in tl.range(0, num_changes):
        # Atomics are neither left out nor put together.
        tl.atomic_xchg(p_range, other_start)
        tl.atomic_xchg(p_range + 1, other_end)
        tl.atomic_xchg(p_range, start)
        tl.atomic_xchg(p_range + 1, end)


def change_range(kv_range: Tensor, other: tuple[int, int], last: tuple[int, int], num_changes: int) -> None:
    # So that the host has launched the next kernel before this one begins.
    torch.cuda._sleep(1_000_000)
    _change_range[(1,)](kv_range, *other, *last, num_changes, num_warps=1)


@pytest.mark.parametrize("num_changes", [1, 4, 16])
@pytest.mark.parametrize("last", RANGES, ids=str)
@pytest.mark.parametrize("other", RANGES, ids=str)
def test_attention(other: tuple[int, int], last: tuple[int, int], num_changes: int) -> None:
    query = torch.randn(1, 8, 1, HEAD_DIM, dtype=torch.bfloat16, device="cuda")
    key, value = torch.randn(2, 1, 2, KV_LEN, HEAD_DIM, dtype=torch.bfloat16, device="cuda")
    kv_range = torch.tensor([last], dtype=torch.int32, device="cuda")
    expected = attention(query, key, value, kv_range.clone())
    change_range(kv_range, other, last, num_changes)
    assert torch.equal(attention(query, key, value, kv_range), expected)


@pytest.mark.parametrize("num_changes", [1, 4, 16])
@pytest.mark.parametrize("last", RANGES, ids=str)
@pytest.mark.parametrize("other", RANGES, ids=str)
def test_fused_attention(other: tuple[int, int], last: tuple[int, int], num_changes: int) -> None:
    options = {"dtype": torch.bfloat16, "device": "cuda"}
    query, key, value = torch.randn(1, 12, 1, HEAD_DIM, **options).split([8, 2, 2], dim=1)
    rotation = torch.randn(1, 1, HEAD_DIM, **options)
    caches = torch.randn(2, 1, 2, KV_LEN, HEAD_DIM, **options)
    kv_range = torch.tensor([last], dtype=torch.int32, device="cuda")
    expected_caches, later_caches = caches.clone(), caches.clone()
    arguments = (query, key, value, rotation, rotation)
    expected = rope_append_attention(*arguments, *expected_caches, kv_range.clone())
    change_range(kv_range, other, last, num_changes)
    assert torch.equal(rope_append_attention(*arguments, *later_caches, kv_range), expected)
    assert torch.equal(later_caches, expected_caches)
