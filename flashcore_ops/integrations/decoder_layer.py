"""A decoder layer's decode step in five ops: linear, rope_append_attention, and three times linear.

Patching swaps the classes of a model's decoder layers and of its head for the ones below. They differ from their
parents only where the rows are one new token each; and there each part still goes its parent's way if a module that
would be bypassed is not what transformers built: quantized, wrapped by an adapter, hooked, or biased.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks
from transformers.activations import SiLUActivation
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaMLP,
    LlamaRMSNorm,
    apply_rotary_pos_emb,
)
from transformers.models.mistral.modeling_mistral import (
    MistralAttention,
    MistralDecoderLayer,
    MistralMLP,
    MistralRMSNorm,
)
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, Qwen2DecoderLayer, Qwen2MLP, Qwen2RMSNorm

from flashcore_ops.integrations.attention_layers import window_of
from flashcore_ops.integrations.cache_guard import check_early
from flashcore_ops.integrations.call_checks import check_options
from flashcore_ops.integrations.static_cache import SharedLengthLayer
from flashcore_ops.integrations.transformers import ATTENTION_NAME
from flashcore_ops.linear_checks import supports_linear

# Beyond, a library's matrix product is faster than reading each weight again for every 32 rows.
MAX_DECODE_ROWS = 32


class FlashCoreDecoderLayer(nn.Module):
    """What the fused classes below add to their parents."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = False,
        position_embeddings: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        layer: Any = self
        is_decode = hidden_states.shape[1] == 1 and hidden_states.shape[0] <= MAX_DECODE_ROWS
        is_packed = kwargs.get("cu_seq_lens_q") is not None
        is_patched = layer.self_attn.config._attn_implementation == ATTENTION_NAME
        if is_packed or not (is_decode and is_patched and is_bypassable(layer.self_attn, *_ATTENTIONS)):
            output: Tensor = super().forward(
                hidden_states,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                position_embeddings=position_embeddings,
                **kwargs,
            )
            return output
        attention = layer.self_attn
        query, key, value = _project(attention, layer.input_layernorm, hidden_states)
        output_weights = _fused_weights(hidden_states, attention.o_proj)
        attended = _attend(
            attention,
            query,
            key,
            value,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_embeddings=position_embeddings,
            next_weight=output_weights[0] if output_weights else None,
            **kwargs,
        )
        hidden_states = _add_product(attention.o_proj, output_weights, attended, hidden_states)
        return _add_mlp(layer.mlp, layer.post_attention_layernorm, hidden_states)


class LlamaFlashCoreDecoderLayer(FlashCoreDecoderLayer, LlamaDecoderLayer):
    """Llama's."""


class MistralFlashCoreDecoderLayer(FlashCoreDecoderLayer, MistralDecoderLayer):
    """Mistral's."""


class Qwen2FlashCoreDecoderLayer(FlashCoreDecoderLayer, Qwen2DecoderLayer):
    """Qwen2's."""


class FlashCoreLinear(nn.Linear):
    """A language model's head."""

    def forward(self, input: Tensor) -> Tensor:
        is_decode = input.dim() == 3 and input.shape[1] == 1 and input.shape[0] <= MAX_DECODE_ROWS
        if is_decode and (weights := _fused_weights(input, self)):
            return _linear(input, weights)
        return super().forward(input)


_FUSED_LAYERS: dict[type[nn.Module], type[nn.Module]] = {
    LlamaDecoderLayer: LlamaFlashCoreDecoderLayer,
    MistralDecoderLayer: MistralFlashCoreDecoderLayer,
    Qwen2DecoderLayer: Qwen2FlashCoreDecoderLayer,
}
_PARENTS = {fused: parent for parent, fused in _FUSED_LAYERS.items()} | {FlashCoreLinear: nn.Linear}
_ATTENTIONS = (LlamaAttention, MistralAttention, Qwen2Attention)
_MLPS = (LlamaMLP, MistralMLP, Qwen2MLP)
_NORMS = (LlamaRMSNorm, MistralRMSNorm, Qwen2RMSNorm)


def fuse_modules(model: nn.Module) -> None:
    """Swaps in the fused class of every module that has one. Weights, names and hooks stay as they are."""
    for module in list(model.modules()):
        if fused := _FUSED_LAYERS.get(type(module)):
            module.__class__ = fused
        head = getattr(module, "lm_head", None)
        if type(head) is nn.Linear:
            head.__class__ = FlashCoreLinear


def unfuse_modules(model: nn.Module) -> None:
    """Undoes `fuse_modules`."""
    for module in model.modules():
        if parent := _PARENTS.get(type(module)):
            module.__class__ = parent


def _project(attention: Any, norm: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Query `[B, Hq, 1, D]`, key and value `[B, Hkv, 1, D]` of the normed hidden states `[B, 1, K]`."""
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    weights = _fused_weights(hidden_states, *projections)
    if weights and _is_fusable_norm(hidden_states, norm):
        joint = _linear(hidden_states, weights, norm=norm)
        parts = joint.split([weight.shape[0] for weight in weights], dim=-1)
    else:
        normed = norm(hidden_states)
        parts = tuple(projection(normed) for projection in projections)
    shape = (hidden_states.shape[0], 1, -1, attention.head_dim)
    query, key, value = (part.view(shape).transpose(1, 2) for part in parts)
    return query, key, value


def _attend(
    attention: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    attention_mask: Tensor | None,
    past_key_values: Any,
    position_embeddings: Any,
    next_weight: Tensor | None,
    **kwargs: Any,
) -> Tensor:
    """Rotates, appends and attends; returns `[B, 1, Hq * D]`. The next kernel reads next_weight."""
    dropout = attention.attention_dropout if attention.training else 0.0
    check_options(dropout, kwargs)
    cos, sin = position_embeddings
    window = window_of(attention)
    cache = _static_layer(past_key_values, attention.layer_idx)
    if cache is not None and attention_mask is not None and attention_mask.dtype == torch.int32:
        output = torch.ops.flashcore.rope_append_attention(
            query,
            key,
            value,
            cos,
            sin,
            cache.keys,
            cache.values,
            attention_mask[:, 0, 0],
            attention.scaling,
            window or 0,
            next_weight=next_weight,
        ).transpose(1, 2)
        cache.advance(1)
    else:
        query, key = apply_rotary_pos_emb(query, key, cos, sin)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, attention.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS[attention.config._attn_implementation]
        output, _ = attend(
            attention,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=attention.scaling,
            sliding_window=window,
            **kwargs,
        )
    return output.flatten(2)


def _static_layer(past_key_values: Any, index: int) -> SharedLengthLayer | None:
    layers = getattr(past_key_values, "layers", ())
    return layers[index] if index < len(layers) and isinstance(layers[index], SharedLengthLayer) else None


def _add_product(projection: Any, weights: list[Tensor] | None, input: Tensor, residual: Tensor) -> Tensor:
    """residual + projection(input), where weights are the projection's if the linear op can stand in for it."""
    return _linear(input, weights, residual=residual) if weights else residual + projection(input)


def _add_mlp(mlp: Any, norm: Any, residual: Tensor) -> Tensor:
    is_standard = (
        is_bypassable(mlp, *_MLPS)
        and is_bypassable(mlp.act_fn, nn.SiLU, SiLUActivation)
        and _is_fusable_norm(residual, norm)
    )
    weights = _fused_weights(residual, mlp.gate_proj, mlp.up_proj) if is_standard else None
    if not weights:
        return residual + mlp(norm(residual))
    gated = _linear(residual, weights, norm=norm, is_gated=True)
    return _add_product(mlp.down_proj, _fused_weights(gated, mlp.down_proj), gated, residual)


def project_normed(head: Any, norm: Any, hidden_states: Tensor) -> Tensor:
    """head(norm(hidden_states))."""
    is_decode = hidden_states.shape[1] == 1 and hidden_states.shape[0] <= MAX_DECODE_ROWS
    weights = _fused_weights(hidden_states, head) if is_decode else None
    if weights and _is_fusable_norm(hidden_states, norm):
        return _linear(hidden_states, weights, norm=norm)
    output: Tensor = head(norm(hidden_states))
    return output


def _linear(
    input: Tensor, weights: list[Tensor], norm: Any = None, residual: Tensor | None = None, is_gated: bool = False
) -> Tensor:
    """The linear op on a model's parameters, which nothing writes in the midst of a step."""
    norm_weight, eps = (None, 0.0) if norm is None else (norm.weight, norm.variance_epsilon)
    output: Tensor = torch.ops.flashcore.linear(input, weights, norm_weight, eps, residual, is_gated, True)
    return output


def _fused_weights(input: Tensor, *linears: Any) -> list[Tensor] | None:
    """The weights of these modules if the linear op can stand in for them on this input."""
    weights: list[Tensor] = []
    for linear in linears:
        if not is_bypassable(linear, nn.Linear, FlashCoreLinear) or linear.bias is not None:
            return None
        weight = linear.weight
        # Tensor subclasses, quantized or sharded ones say, bring their own matrix product.
        if type(weight) not in (Tensor, nn.Parameter) or not supports_linear(weight, dtype=input.dtype):
            return None
        weights.append(weight)
    return None if torch.is_autocast_enabled(input.device.type) or _needs_gradient(input, *weights) else weights


def _needs_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _is_fusable_norm(input: Tensor, norm: Any) -> bool:
    """Whether the linear op can take this norm before its products."""
    return is_bypassable(norm, *_NORMS) and supports_linear(norm.weight, dtype=input.dtype)


def is_bypassable(module: Any, *types: type[nn.Module]) -> bool:
    """Whether nobody would notice that the module's own call is left out."""
    return type(module) in types and not is_hooked(module)


def is_hooked(module: nn.Module) -> bool:
    """Whether someone has put something of their own around one module's call."""
    own = module.__dict__
    if "forward" in own or own.get("_compiled_call_impl") is not None:
        return True
    if _global_forward_hooks or _global_forward_pre_hooks:
        return True
    before, after = own["_forward_pre_hooks"], own["_forward_hooks"]
    # Asked of hundreds of modules at every eager step, and traced as often.
    if not before and not after:
        return False
    # transformers leaves its recorders in place after a call that asked for attention weights or hidden states.
    return any(hook is not check_early for hook in before.values()) or any(
        getattr(hook, "__name__", "") != "output_capturing_hook" for hook in after.values()
    )
