"""Arithmetic of memory: bytes of KV caches and weights, and the largest cache that fits beside the weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import nn

from flashcore_ops.errors import OptionError

# For activations, logits, library workspaces and what graphs hold. A prompt of tens of thousands of tokens that runs
# in one piece needs more.
RESERVE_BYTES = 2 * 2**30


@dataclass(frozen=True)
class KVShape:
    """What decides the size of a model's KV cache.

    A sliding window is no part of it: FlashCore's static caches keep every token, since a window that attention applies
    leaves slots and graphs alone.

    Source: the KV cache of grouped-query attention, https://arxiv.org/abs/2305.13245

    Example:
        >>> llama_8b = KVShape(num_layers=32, num_query_heads=32, num_kv_heads=8, head_dim=128)
        >>> llama_8b.cache_bytes(batch=8, length=2048, dtype=torch.bfloat16) / 1e9
        2.147483648
        >>> llama_8b.as_mha().cache_bytes(batch=8, length=2048, dtype=torch.bfloat16) / 1e9
        8.589934592
    """

    num_layers: int
    num_query_heads: int
    num_kv_heads: int
    head_dim: int

    @classmethod
    def of(cls, config: Any) -> Self:
        """The shape that a transformers config of a decoder gives its cache.

        Example:
            >>> from flashcore_ops.model_shapes import shape_config
            >>> KVShape.of(shape_config("qwen2.5-7b"))
            KVShape(num_layers=28, num_query_heads=28, num_kv_heads=4, head_dim=128)
        """
        return cls(
            num_layers=config.num_hidden_layers,
            num_query_heads=config.num_attention_heads,
            # GPT-NeoX has MHA and no name for it.
            num_kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        )

    def as_mha(self) -> Self:
        """The same model if each query head had a key and a value of its own."""
        return replace(self, num_kv_heads=self.num_query_heads)

    def token_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of one token's keys and values in all layers: 2 x layers x KV heads x head dim x bytes an element.

        Example:
            >>> KVShape(num_layers=32, num_query_heads=32, num_kv_heads=8, head_dim=128).token_bytes(torch.bfloat16)
            131072
        """
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * dtype.itemsize

    def cache_bytes(self, batch: int, length: int, dtype: torch.dtype) -> int:
        """Bytes of a static cache of `batch` rows with `length` slots each.

        Raises:
            OptionError: batch or length is below 1.
        """
        _check_count("batch", batch)
        _check_count("length", length)
        return batch * length * self.token_bytes(dtype)

    def largest_batch(self, room: int, length: int, dtype: torch.dtype) -> int:
        """The most rows of `length` slots that fit into `room` bytes; 0 if not one does.

        Raises:
            OptionError: length is below 1.

        Example:
            >>> llama_8b = KVShape(num_layers=32, num_query_heads=32, num_kv_heads=8, head_dim=128)
            >>> llama_8b.largest_batch(room=60 * 10**9, length=8192, dtype=torch.bfloat16)
            55
        """
        return max(room, 0) // self.cache_bytes(batch=1, length=length, dtype=dtype)

    def largest_length(self, room: int, batch: int, dtype: torch.dtype) -> int:
        """The most slots a row of a cache for `batch` rows that fits into `room` bytes; 0 if not one does.

        Raises:
            OptionError: batch is below 1.

        Example:
            >>> llama_8b = KVShape(num_layers=32, num_query_heads=32, num_kv_heads=8, head_dim=128)
            >>> llama_8b.largest_length(room=60 * 10**9, batch=8, dtype=torch.bfloat16)
            57220
        """
        return max(room, 0) // self.cache_bytes(batch=batch, length=1, dtype=dtype)


def weight_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters, tied ones counted once. A model on the meta device has them too.

    Example:
        >>> from flashcore_ops.model_shapes import random_model, shape_config
        >>> weight_bytes(random_model(shape_config("llama-3.2-1b"), torch.bfloat16, torch.device("meta")))
        2471628800
    """
    return sum(parameter.nbytes for parameter in model.parameters())


def cache_room(memory: int, weights: int, reserve: int = RESERVE_BYTES) -> int:
    """Bytes that a GPU of `memory` bytes has for a KV cache beside `weights`; 0 if these leave nothing.

    Args:
        memory: bytes of the GPU.
        weights: bytes of the model, as `weight_bytes` counts them.
        reserve: bytes that are left to everything else, as RESERVE_BYTES says.

    Raises:
        OptionError: an amount is negative.

    Example:
        >>> cache_room(memory=80 * 10**9, weights=16 * 10**9, reserve=2 * 10**9)
        62000000000
    """
    for name, amount in (("memory", memory), ("weights", weights), ("reserve", reserve)):
        if amount < 0:
            raise OptionError.explain(name, expected="0 bytes or more", got=str(amount), fix="Pass an amount.")
    return max(memory - weights - reserve, 0)


def _check_count(name: str, number: int) -> None:
    if number < 1:
        raise OptionError.explain(name, expected="1 or more", got=str(number), fix="Count rows and tokens from 1.")


def format_bytes(num_bytes: int) -> str:
    """Bytes in decimal units, as the field writes them.

    Example:
        >>> [format_bytes(number) for number in (65_536, 2_147_483_648, 1_234_567_890_123)]
        ['65.5 kB', '2.1 GB', '1,234.6 GB']
    """
    for unit, factor in (("GB", 10**9), ("MB", 10**6)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:,.1f} {unit}"
    return f"{num_bytes / 1000:,.1f} kB"
