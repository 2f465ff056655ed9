"""Calls of a patched model that are refused leave the caller's cache as it was.

transformers' layers append first and attend then. Refused by an attention alone, a call would leave the cache grown in
the layers up to it, and the next call on that cache would count their tokens twice. So the stack of layers asks ahead.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from flashcore_ops.checks import check_no_gradients
from flashcore_ops.integrations.call_checks import check_mask, check_not_a_channel, check_options
from flashcore_ops.integrations.model_checks import check_dtype
from flashcore_ops.integrations.packing import check_bound_values, check_sequence_bounds
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
    """A forward pre-hook of a stack of layers: what only the caller's arguments tell, and what its attentions are
    going to refuse, if there is a cache.

    What only the ops can tell is still found by the first layer: tensors on different devices.
    """
    if stack.config._attn_implementation != ATTENTION_NAME:
        return
    given = _by_name(stack, args, kwargs)
    inputs = given.get("inputs_embeds") if given.get("input_ids") is None else given["input_ids"]
    if inputs is None:
        # The model says so.
        return
    attention_mask = given.get("attention_mask")
    # One for all layers, or one for each kind of them.
    masks = attention_mask if isinstance(attention_mask, dict) else {None: attention_mask}
    for mask in masks.values():
        check_not_a_channel(mask)
    if given.get("cu_seq_lens_q") is not None:
        bounds, key_bounds = given["cu_seq_lens_q"], given.get("cu_seq_lens_k")
        check_sequence_bounds(bounds, key_bounds, None, has_past=False)
        check_bound_values(bounds, key_bounds, num_rows=inputs.shape[0] * inputs.shape[1])
    if given.get("past_key_values") is not None:
        _check_before_appending(stack, inputs, masks, given)


def _check_before_appending(stack: Any, inputs: Tensor, masks: dict[str | None, Any], given: dict[str, Any]) -> None:
    dropouts = [getattr(each, "attention_dropout", 0.0) for each in attentions_of(stack)] if stack.training else []
    check_options(max(dropouts, default=0.0), given)
    dense_masks = {kind: mask for kind, mask in masks.items() if _is_dense(mask)}
    # The dense path serves gradients.
    if torch.is_grad_enabled() and not dense_masks:
        check_no_gradients(given.get("inputs_embeds"), *_parameters_before_the_last_attention(stack))
    is_cast = _is_cast(inputs)
    if not is_cast:
        check_dtype(stack)
    if not dense_masks and given.get("cu_seq_lens_q") is None:
        return
    (batch, query_len), past = inputs.shape[:2], given["past_key_values"]
    dtype = None if is_cast else stack.dtype
    kinds = [None] * len(stack.layers) if None in masks else stack.config.layer_types
    for kv_len, kind in dict.fromkeys((past.get_mask_sizes(query_len, i)[0], kind) for i, kind in enumerate(kinds)):
        shape = (batch, stack.config.num_attention_heads, query_len, kv_len)
        check_mask(dense_masks.get(kind), shape, dtype, given)


def _is_dense(mask: Any) -> bool:
    return isinstance(mask, Tensor) and mask.dim() == 4 and mask.dtype != torch.int32


def _by_name(stack: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    # Dynamo does not trace signatures.
    if len(args) < 2 or torch.compiler.is_compiling():
        return dict(zip(("input_ids",), args, strict=False)) | kwargs
    return inspect.signature(stack.forward).bind_partial(*args).arguments | kwargs


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
    # Meta tensors know no autocast. Whether a device does is a question that torch 2.11's Dynamo does not trace.
    return inputs.device.type != "meta" and torch.is_autocast_enabled(inputs.device.type)


# A patched model that comes out of a pickle imports this module and needs `fcore`.
register_fcore()
