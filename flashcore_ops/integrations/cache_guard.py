"""Calls of a patched model that are refused leave the caller's cache as it was.

transformers' layers append first and attend then. Refused by an attention alone, a call would leave the cache grown in
the layers up to it, and the next call on that cache would count their tokens twice. So the stack of layers asks ahead.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from flashcore_ops.checks import check_no_gradients
from flashcore_ops.integrations.call_checks import check_mask, check_options
from flashcore_ops.integrations.transformers import ATTENTION_NAME, register_fcore

_HANDLE = "_flashcore_cache_guard"
# The projections behind an attention, by the families' names.
_OUTPUTS = ("o_proj", "dense")


def guard_caches(model: nn.Module) -> None:
    """Has every stack of layers in the model ask ahead."""
    for module in _stacks(model):
        setattr(module, _HANDLE, module.register_forward_pre_hook(check_early, with_kwargs=True))


def unguard_caches(model: nn.Module) -> None:
    """Undoes `guard_caches`."""
    for module in _stacks(model):
        if _HANDLE in vars(module):
            getattr(module, _HANDLE).remove()
            delattr(module, _HANDLE)


def check_early(stack: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A forward pre-hook of a stack of layers: what its attentions are going to refuse, if the caller passes a cache.

    What only the ops can tell is still found by the first layer: tensors whose dtypes or devices do not match.
    """
    past: Any = kwargs.get("past_key_values")
    if past is None or stack.config._attn_implementation != ATTENTION_NAME:
        return
    dropouts = [getattr(each, "attention_dropout", 0.0) for each in attentions_of(stack)] if stack.training else []
    check_options(max(dropouts, default=0.0), kwargs)
    attention_mask = kwargs.get("attention_mask")
    is_dense = isinstance(attention_mask, Tensor) and attention_mask.dim() == 4 and attention_mask.dtype != torch.int32
    # The dense path serves gradients.
    if torch.is_grad_enabled() and not is_dense:
        check_no_gradients(kwargs.get("inputs_embeds"), *_parameters_before_the_last_attention(stack))
    if not is_dense and kwargs.get("cu_seq_lens_q") is None:
        return
    inputs: Any = args[0] if args else kwargs.get("input_ids")
    inputs = kwargs["inputs_embeds"] if inputs is None else inputs
    batch, query_len = inputs.shape[:2]
    for kv_len in sorted({past.get_mask_sizes(query_len, i)[0] for i in range(len(stack.layers))}):
        shape = (batch, stack.config.num_attention_heads, query_len, kv_len)
        check_mask(attention_mask if is_dense else None, shape, None if _is_cast(inputs) else stack.dtype, kwargs)


def attentions_of(module: nn.Module) -> list[Any]:
    """The attentions in it, in their order."""
    # What transformers gives every attention, and adapters to nothing.
    return [each for each in module.modules() if hasattr(each, "scaling") and hasattr(each, "layer_idx")]


def _stacks(model: nn.Module) -> list[nn.Module]:
    return [
        module
        for module in model.modules()
        if isinstance(module, PreTrainedModel) and isinstance(getattr(module, "layers", None), nn.ModuleList)
    ]


def _parameters_before_the_last_attention(stack: Any) -> Iterator[nn.Parameter]:
    """Those that queries, keys and values of some layer come from."""
    yield from stack.get_input_embeddings().parameters()
    for layer in stack.layers[:-1]:
        yield from layer.parameters()
    for attention in attentions_of(stack.layers[-1]):
        yield from (parameter for name, parameter in attention.named_parameters() if not name.startswith(_OUTPUTS))


def _is_cast(inputs: Tensor) -> bool:
    kind = inputs.device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


# A patched model that comes out of a pickle imports this module and needs `fcore`.
register_fcore()
