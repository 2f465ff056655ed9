"""Bytes of KV caches and weights: the published example, real caches to the byte, and what fits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashcore_ops import make_static_cache
from flashcore_ops.errors import OptionError
from flashcore_ops.kv_memory import RESERVE_BYTES, KVShape, cache_room, weight_bytes
from flashcore_ops.model_shapes import SHAPES, random_model, shape_config
from tests.integrations.models import FAMILIES, make_model

LLAMA_8B = KVShape(num_layers=32, num_query_heads=32, num_kv_heads=8, head_dim=128)
BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn
META = torch.device("meta")


def test_llama_3_1_8b_at_2048_tokens_and_batch_8() -> None:
    shape = KVShape.of(shape_config("llama-3.1-8b"))
    assert shape == LLAMA_8B
    assert shape.cache_bytes(batch=8, length=2048, dtype=BF16) == 2_147_483_648
    assert shape.as_mha().cache_bytes(batch=8, length=2048, dtype=BF16) == 8_589_934_592


@pytest.mark.parametrize(
    ("name", "token"),
    [
        ("llama-3.2-1b", 32_768),
        ("llama-3.2-3b", 114_688),
        ("llama-3.1-8b", 131_072),
        ("llama-3.1-70b", 327_680),
        ("mistral-7b-v0.3", 131_072),
        ("qwen2.5-7b", 57_344),
    ],
)
def test_bytes_of_a_token(name: str, token: int) -> None:
    shape = KVShape.of(shape_config(name))
    assert shape.token_bytes(BF16) == token
    assert shape.token_bytes(torch.float32) == 2 * token
    assert shape.token_bytes(FP8) * 2 == token


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_a_static_cache_has_these_bytes(name: str, dtype: torch.dtype) -> None:
    model = random_model(shape_config(name), dtype, META)
    expected = KVShape.of(model.config).cache_bytes(batch=3, length=1000, dtype=dtype)
    assert static_cache_bytes(model, batch=3, length=1000) == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_a_window_saves_nothing(family: str) -> None:
    model = make_model(family)
    expected = KVShape.of(model.config).cache_bytes(batch=2, length=100, dtype=torch.float32)
    assert static_cache_bytes(model, batch=2, length=100) == expected


def static_cache_bytes(model: torch.nn.Module, batch: int, length: int) -> int:
    cache = make_static_cache(model, batch_size=batch, max_cache_len=length)
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def test_as_mha_is_the_group_times_as_large_and_leaves_mha_alone() -> None:
    mha = LLAMA_8B.as_mha()
    assert mha.token_bytes(BF16) == 4 * LLAMA_8B.token_bytes(BF16)
    assert mha.as_mha() == mha


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_weights_count_tied_parameters_once(dtype: torch.dtype) -> None:
    config = shape_config("llama-3.2-1b", num_layers=1)
    tied = weight_bytes(random_model(config, dtype, META))
    config.tie_word_embeddings = False
    untied = weight_bytes(random_model(config, dtype, META))
    assert untied - tied == config.vocab_size * config.hidden_size * dtype.itemsize


def test_room_is_what_weights_and_reserve_leave() -> None:
    assert cache_room(memory=80 * 10**9, weights=16 * 10**9) == 64 * 10**9 - RESERVE_BYTES
    assert cache_room(memory=10, weights=6, reserve=4) == 0
    assert cache_room(memory=10, weights=60, reserve=4) == 0


@settings(max_examples=50, deadline=None)
@given(room=st.integers(0, 10**12), size=st.integers(1, 10**6))
def test_the_largest_fits_and_one_more_does_not(room: int, size: int) -> None:
    batch = LLAMA_8B.largest_batch(room, length=size, dtype=BF16)
    assert batch * size * LLAMA_8B.token_bytes(BF16) <= room < (batch + 1) * size * LLAMA_8B.token_bytes(BF16)
    length = LLAMA_8B.largest_length(room, batch=size, dtype=FP8)
    assert length * size * LLAMA_8B.token_bytes(FP8) <= room < (length + 1) * size * LLAMA_8B.token_bytes(FP8)


def test_nothing_fits_into_less_than_nothing() -> None:
    assert LLAMA_8B.largest_batch(-1, length=1, dtype=BF16) == 0
    assert LLAMA_8B.largest_length(-1, batch=1, dtype=BF16) == 0


def test_counts_below_one_and_negative_amounts_are_refused() -> None:
    with pytest.raises(OptionError, match="batch: expected 1 or more, got 0"):
        LLAMA_8B.cache_bytes(batch=0, length=1, dtype=BF16)
    with pytest.raises(OptionError, match="length: expected 1 or more, got -1"):
        LLAMA_8B.cache_bytes(batch=1, length=-1, dtype=BF16)
    with pytest.raises(OptionError, match="length: expected 1 or more, got 0"):
        LLAMA_8B.largest_batch(10**9, length=0, dtype=BF16)
    with pytest.raises(OptionError, match="batch: expected 1 or more, got 0"):
        LLAMA_8B.largest_length(10**9, batch=0, dtype=BF16)
    for amount in ("memory", "weights", "reserve"):
        with pytest.raises(OptionError, match=f"{amount}: expected 0 bytes or more, got -1"):
            cache_room(**({"memory": 0, "weights": 0, "reserve": 0} | {amount: -1}))
