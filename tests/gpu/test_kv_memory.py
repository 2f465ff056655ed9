"""The arithmetic of KV-cache memory against what torch allocates on a GPU."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

from flashcore_ops import make_static_cache
from flashcore_ops.kv_memory import KVShape
from flashcore_ops.model_shapes import random_model, shape_config

pytestmark = pytest.mark.gpu

TOLERANCE = 0.02


def config_with_small_weights(name: str, *, is_mha: bool) -> Any:
    """The layers and heads of a published model, whose cache is thus of its size, over projections of next to none."""
    config = shape_config(name)
    kv_heads = config.num_attention_heads if is_mha else config.num_key_value_heads
    config.update({"head_dim": KVShape.of(config).head_dim, "num_key_value_heads": kv_heads})
    config.update({"vocab_size": 96, "hidden_size": 64, "intermediate_size": 64})
    return config


@pytest.mark.parametrize(
    ("name", "is_mha", "batch", "length", "gigabytes"),
    [
        pytest.param("llama-3.1-8b", False, 8, 2048, 2.1, id="llama-3.1-8b"),
        pytest.param("llama-3.1-8b", True, 8, 2048, 8.6, id="llama-3.1-8b-as-mha"),
        pytest.param("qwen2.5-7b", False, 3, 1001, 0.2, id="qwen2.5-7b"),
    ],
)
def test_torch_allocates_what_the_arithmetic_says(
    name: str, is_mha: bool, batch: int, length: int, gigabytes: float
) -> None:
    config = config_with_small_weights(name, is_mha=is_mha)
    expected = KVShape.of(config).cache_bytes(batch=batch, length=length, dtype=torch.bfloat16)
    assert round(expected / 1e9, 1) == gigabytes
    model = random_model(config, torch.bfloat16, torch.device("cuda"))
    gc.collect()
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < 1.1 * expected:
        pytest.skip(f"less than {1.1 * expected / 1e9:.1f} GB are free")
    before = torch.cuda.memory_allocated()
    cache = make_static_cache(model, batch_size=batch, max_cache_len=length)
    allocated = torch.cuda.memory_allocated() - before
    assert abs(allocated - expected) <= TOLERANCE * expected
    assert sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) == expected
