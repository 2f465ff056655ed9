"""A decode step straight through a model's layers.

Around the layers, a model's own forward is some thirty small kernels a step: masks, rotations, the last norm,
bookkeeping. Where every part is what transformers built, one kernel stands in for those before the layers, and the
head's own for those behind.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaForCausalLM, LlamaModel, LlamaRotaryEmbedding
from transformers.models.mistral.modeling_mistral import MistralForCausalLM, MistralModel, MistralRotaryEmbedding
from transformers.models.qwen2.modeling_qwen2 import Qwen2ForCausalLM, Qwen2Model, Qwen2RotaryEmbedding

from flashcore_ops.integrations.capture import chooses_frequencies
from flashcore_ops.integrations.decoder_layer import (
    FlashCoreDecoderLayer,
    is_bypassable,
    is_hooked,
    project_normed,
)

_STACKS: dict[type[nn.Module], tuple[type[nn.Module], type[nn.Module]]] = {
    LlamaForCausalLM: (LlamaModel, LlamaRotaryEmbedding),
    MistralForCausalLM: (MistralModel, MistralRotaryEmbedding),
    Qwen2ForCausalLM: (Qwen2Model, Qwen2RotaryEmbedding),
}


def is_plain_stack(model: Any) -> bool:
    """Whether `decode_logits` may stand in for the model's forward: all around its layers is transformers' own."""
    # The class, not the type, which a weak reference has of its own; and its forward, since patching subclasses it.
    parent = next((parent for parent in _STACKS if issubclass(model.__class__, parent)), None)
    if parent is None or model.__class__.forward is not parent.forward or is_hooked(model):
        return False
    stack_type, rotary_type = _STACKS[parent]
    stack = model.model
    return (
        is_bypassable(stack, stack_type)
        and is_bypassable(stack.embed_tokens, nn.Embedding)
        and is_bypassable(stack.rotary_emb, rotary_type)
        and not chooses_frequencies(stack.rotary_emb)
        and type(stack.embed_tokens.weight) in (Tensor, nn.Parameter)
        and all(isinstance(layer, FlashCoreDecoderLayer) for layer in stack.layers)
    )


def decode_logits(
    model: Any, cache: Any, *, tokens: Tensor, start: Tensor, position_offset: Tensor, length: Tensor
) -> Tensor:
    """The logits `[B, V]` behind tokens `[B, 1]`, which go to slot `length` of a static cache of ours.

    Args:
        start: int32 `[B]`, the first slot of each row's tokens.
        position_offset: int64 `[B]`, slot less position.
        length: int64, one number: the tokens in the cache. The first layer counts it up.
    """
    stack = model.model
    embed = _embed_on_cuda if tokens.is_cuda else _embed
    hidden, cos, sin, kv_range = embed(stack, tokens, start, position_offset, length)
    for layer in stack.layers[: stack.config.num_hidden_layers]:
        hidden = layer(
            hidden,
            attention_mask=kv_range[:, None, None],
            past_key_values=cache,
            use_cache=True,
            position_embeddings=(cos, sin),
        )
    return project_normed(model.lm_head, stack.norm, hidden)[:, -1]


def _embed(
    stack: Any, tokens: Tensor, start: Tensor, position_offset: Tensor, length: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The hidden states `[B, 1, K]`, their cos and sin `[B, 1, D]`, and the slots `[B, 2]` that they see."""
    hidden = stack.embed_tokens(tokens)
    cos, sin = stack.rotary_emb(hidden, (length - position_offset)[:, None])
    kv_range = torch.stack((start, (length + 1).to(torch.int32).expand_as(start)), dim=-1)
    return hidden, cos, sin, kv_range


def _embed_on_cuda(
    stack: Any, tokens: Tensor, start: Tensor, position_offset: Tensor, length: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `_embed`, in one kernel. A token outside the vocabulary makes its row NaN."""
    from flashcore_ops import cuda

    rotary, weight = stack.rotary_emb, stack.embed_tokens.weight
    if not (weight.is_contiguous() and weight.device == rotary.inv_freq.device == tokens.device):
        return _embed(stack, tokens, start, position_offset, length)
    hidden = weight.new_empty((tokens.shape[0], 1, weight.shape[1]))
    cos, sin = (weight.new_empty((tokens.shape[0], 1, 2 * rotary.inv_freq.shape[0])) for _ in range(2))
    kv_range = torch.empty((tokens.shape[0], 2), dtype=torch.int32, device=tokens.device)
    cuda.step_input(
        *(tokens, start, position_offset, length),
        embedding=weight,
        inv_freq=rotary.inv_freq.float(),
        attention_scaling=float(rotary.attention_scaling),
        hidden=hidden,
        cos=cos,
        sin=sin,
        kv_range=kv_range,
    )
    return hidden, cos, sin, kv_range
