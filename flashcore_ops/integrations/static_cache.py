"""The static cache that decode graphs run on: fixed addresses, one counter for all layers, no host synchronisation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, StaticLayer

from flashcore_ops.errors import CapacityError, DeviceError, OptionError
from flashcore_ops.kv_memory import KVShape


class SharedLengthLayer(StaticLayer):
    """One layer's slots. All layers count with one tensor, which the first of them moves on in each forward pass.

    A window layer keeps every token too: attention's own window hides the old ones, so nothing is rolled or counted on
    the host, and no graph is recorded anew.
    """

    def __init__(self, keys: Tensor, values: Tensor, length: Tensor, is_first: bool) -> None:
        super().__init__(max_cache_len=keys.shape[2])
        self.keys, self.values = keys, values
        self.cumulative_length = length
        self.is_first = is_first
        self.dtype, self.device = keys.dtype, keys.device
        self.batch_size, self.num_heads, _, self.k_head_dim = keys.shape
        self.v_head_dim = values.shape[-1]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends `[B, Hkv, T, D]` keys and values and returns the whole buffers. Tokens past the end are dropped."""
        num_tokens = key_states.shape[2]
        check_capacity(num_tokens, self.max_cache_len)
        self.advance(num_tokens)
        positions = (self.cumulative_length - num_tokens).expand(key_states.shape[0])
        torch.ops.flashcore.append_kv_(self.keys, self.values, key_states, value_states, positions)
        return self.keys, self.values

    def advance(self, num_tokens: int) -> None:
        """Counts tokens that come into this layer. The first layer counts for all, since no model leaves it out."""
        if self.is_first:
            self.cumulative_length.add_(num_tokens)

    def reset(self) -> None:
        """Forgets all tokens. What stands in the slots is never read."""
        if self.is_first:
            self.cumulative_length.zero_()


def check_capacity(num_tokens: int, max_cache_len: int) -> None:
    """Raises CapacityError if a static cache has no room for so many tokens."""
    if num_tokens > max_cache_len:
        raise CapacityError.explain(
            "past_key_values",
            expected=f"room for {num_tokens} tokens",
            got=f"a static cache of {max_cache_len} slots",
            fix="Make it with a larger max_cache_len, or pass fewer tokens.",
        )


def make_static_cache(model: PreTrainedModel, batch_size: int, max_cache_len: int) -> Cache:
    """A cache of fixed size for `torch.compile`d decoding of a patched model.

    Args:
        model: a patched model on one device.
        batch_size: B, the rows of each call to come.
        max_cache_len: S, the tokens a row may hold, prompt and padding included.

    Returns:
        A transformers Cache to pass as `past_key_values`, with keys and values `[B, Hkv, S, D]` in the model's dtype
        and on its device for each layer: `2 * layers * B * Hkv * S * D` elements. `reset()` empties it at no cost. It
        may be passed to one call at a time.

        In a compiled step past the last slot the token is dropped and its logits are NaN; eager calls on the CPU and
        every prefill raise CapacityError before anything is written.

    Raises:
        OptionError: batch_size or max_cache_len is below 1.
        DeviceError: the model's layers are on several devices.

    Source: transformers.cache_utils.StaticCache, whose layers these are.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(vocab_size=64, hidden_size=64, intermediate_size=64, num_attention_heads=4)
        >>> model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **sizes))
        >>> cache = make_static_cache(model, batch_size=1, max_cache_len=128)
        >>> cache.layers[0].keys.shape
        torch.Size([1, 4, 128, 16])
    """
    for name, number in (("batch_size", batch_size), ("max_cache_len", max_cache_len)):
        if number < 1:
            raise OptionError.explain(name, expected="1 or more", got=str(number), fix="Count rows and tokens from 1.")
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) != 1:
        raise DeviceError.explain(
            "model",
            expected="all weights on one device",
            got=", ".join(sorted(map(str, devices))),
            fix="Load the model without device_map, or use a DynamicCache.",
        )
    shape = KVShape.of(model.config.get_text_config(decoder=True))
    dtype, device = model.get_input_embeddings().weight.dtype, devices.pop()
    # Tensors made under inference_mode could not be written outside it, in a graph or a later call.
    with torch.inference_mode(False):
        length = torch.zeros((), dtype=torch.int64, device=device)
        layers = [
            SharedLengthLayer(
                *_allocate_slots(shape, batch_size, max_cache_len, dtype=dtype, device=device),
                length=length,
                is_first=index == 0,
            )
            for index in range(shape.num_layers)
        ]
    torch._dynamo.mark_static_address(length)
    return Cache(layers=layers)


def _allocate_slots(
    shape: KVShape, batch_size: int, max_cache_len: int, *, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Keys and values, two tensors of fixed address: CUDA graphs may then write to them."""
    sizes = (batch_size, shape.num_kv_heads, max_cache_len, shape.head_dim)
    keys, values = (torch.zeros(sizes, dtype=dtype, device=device) for _ in range(2))
    torch._dynamo.mark_static_address(keys)
    torch._dynamo.mark_static_address(values)
    return keys, values
