"""attention_with_kv_cache: growing the past token by token is attention over the whole sequence."""

from __future__ import annotations

import pytest
import torch

from flashcore_ops import attention, attention_with_kv_cache
from flashcore_ops.errors import DeviceError, DtypeError, GradientError, OptionError, ShapeError


def random_heads(num_heads: int, num_tokens: int, device: str) -> torch.Tensor:
    return torch.randn(2, num_heads, num_tokens, 32, device=device)


def merge_heads(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.transpose(1, 2).flatten(2)


@pytest.mark.parametrize("options", [{}, {"window": 3}, {"softcap": 2.0, "scale": 0.4}], ids=str)
def test_token_by_token_equals_the_whole_sequence(device, options):
    query, key, value = random_heads(4, 11, device), random_heads(2, 11, device), random_heads(2, 11, device)
    expected = attention(query, key, value, **options)
    past, outputs = None, []
    for first, last in [(0, 5), (5, 6), (6, 7), (7, 11)]:
        new = slice(first, last)
        output, past = attention_with_kv_cache(query[:, :, new], key[:, :, new], value[:, :, new], past, **options)
        outputs.append(output)
    assert past is not None
    assert torch.equal(past[0], key)
    assert torch.equal(past[1], value)
    torch.testing.assert_close(torch.cat(outputs, dim=2), expected, rtol=2e-6, atol=2e-6)


def test_merged_heads_equal_split_heads(device):
    query, key, value = random_heads(4, 7, device), random_heads(2, 7, device), random_heads(2, 7, device)
    past = random_heads(2, 9, device), random_heads(2, 9, device)
    expected, expected_past = attention_with_kv_cache(query, key, value, past)
    output, new_past = attention_with_kv_cache(
        merge_heads(query), merge_heads(key), merge_heads(value), past, num_query_heads=4, num_kv_heads=2
    )
    assert torch.equal(output, merge_heads(expected))
    assert output.is_contiguous()
    split, _ = attention_with_kv_cache(query, key, value, past, num_query_heads=4, num_kv_heads=2)
    assert torch.equal(split, expected)
    assert torch.equal(new_past[0], expected_past[0])
    assert torch.equal(new_past[1], expected_past[1])


def test_update_cache_false_sees_new_tokens_and_returns_the_past_itself(device):
    query, key, value = random_heads(4, 3, device), random_heads(2, 3, device), random_heads(2, 3, device)
    past = random_heads(2, 9, device), random_heads(2, 9, device)
    before = past[0].clone(), past[1].clone()
    output, returned = attention_with_kv_cache(query, key, value, past, update_cache=False)
    updated, _ = attention_with_kv_cache(query, key, value, past)
    assert returned is past
    assert torch.equal(past[0], before[0])
    assert torch.equal(past[1], before[1])
    assert torch.equal(output, updated)
    _, nothing = attention_with_kv_cache(query, key, value, update_cache=False)
    assert nothing is None


def test_is_causal_and_kv_range_count_past_and_new_columns(device):
    query, key, value = random_heads(4, 2, device), random_heads(2, 2, device), random_heads(2, 2, device)
    past = random_heads(2, 4, device), random_heads(2, 4, device)
    kv_range = torch.tensor([[0, 6], [3, 6]], dtype=torch.int32, device=device)
    output, (all_key, all_value) = attention_with_kv_cache(
        query, key, value, past, is_causal=False, kv_range=kv_range, sinks=torch.ones(4, device=device)
    )
    expected = attention(
        query, all_key, all_value, kv_range=kv_range, is_causal=False, sinks=torch.ones(4, device=device)
    )
    assert torch.equal(output, expected)


def test_bad_input():
    query, key, value = random_heads(4, 2, "cpu"), random_heads(2, 2, "cpu"), random_heads(2, 2, "cpu")
    with pytest.raises(
        OptionError, match=r"^num_query_heads, num_kv_heads: expected both or neither, got 4 and None\."
    ):
        attention_with_kv_cache(query, key, value, num_query_heads=4)
    with pytest.raises(ShapeError, match=r"^query: expected \[B, T, H\*D\] or \[B, H, T, D\] with H = 8 heads, got "):
        attention_with_kv_cache(query, key, value, num_query_heads=8, num_kv_heads=2)
    merged = merge_heads(query), merge_heads(key), merge_heads(value)
    with pytest.raises(ShapeError, match=r"^key: expected \[B, T, H\*D\] or \[B, H, T, D\] with H = 3 heads"):
        attention_with_kv_cache(*merged, num_query_heads=4, num_kv_heads=3)
    with pytest.raises(ShapeError, match=r"^past_key_value\[0\]: expected the batch, heads and head dim"):
        attention_with_kv_cache(query, key, value, (key[:1], value[:1]))
    with pytest.raises(ShapeError, match=r"^past_key_value: expected a \(key, value\) pair, got 1 entries\."):
        attention_with_kv_cache(query, key, value, (key,))
    with pytest.raises(DeviceError, match=r"^past_key_value\[0\]: expected the new tokens' device cpu, got meta\."):
        attention_with_kv_cache(query, key, value, (key.to("meta"), value.to("meta")))
    with pytest.raises(DtypeError, match=r"^past_key_value\[1\]: expected the new tokens' torch.float32, got "):
        attention_with_kv_cache(query, key, value, (key, value.half()))
    with pytest.raises(GradientError, match=r"torch\.no_grad\(\)"):
        attention_with_kv_cache(query.requires_grad_(), key, value)
