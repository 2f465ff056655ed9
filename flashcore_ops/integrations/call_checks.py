"""What a call of a patched model is refused for: found before its first layer appends to the cache.

transformers' layers append first and attend then. Refused by its attention alone, a call would leave the first layer's
cache grown, and the next call on that cache would count its tokens twice. So the first attention of a model asks ahead.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from flashcore_ops.checks import check_no_gradients
from flashcore_ops.errors import MaskError, OptionError, UnsupportedModelError
from flashcore_ops.integrations.dense import check_dense_mask
from flashcore_ops.integrations.packing import check_sequence_bounds, is_flag, is_sequence_bounds
from flashcore_ops.integrations.transformers import ATTENTION_NAME

# Fused layers serve none of them; `fcore_attention` has the first two as arguments of its own.
_UNSERVED_FEATURES = ("softcap", "s_aux", "position_bias")
_HANDLE = "_flashcore_early_check"


def check_options(dropout: float, kwargs: dict[str, Any]) -> None:
    """Raises OptionError or UnsupportedModelError for what no attention of ours serves."""
    if dropout > 0:
        raise OptionError.explain(
            "attention_dropout",
            expected="0, since FlashCore is for inference",
            got=f"{dropout} in training mode",
            fix="Call model.eval(), or set config.attention_dropout to 0.",
        )
    if kwargs.get("output_attentions"):
        raise OptionError.explain(
            "output_attentions",
            expected="False, since no attention weights are kept",
            got="True",
            fix='Call restore_attention(model) and model.set_attn_implementation("eager").',
        )
    for name in _UNSERVED_FEATURES:
        if kwargs.get(name) is not None:
            raise UnsupportedModelError.explain(
                name,
                expected="None",
                got="a layer that uses it",
                fix="Patch only models that patch_model accepts.",
            )


def check_mask(
    attention_mask: Any, shape: tuple[int, int, int, int], dtype: torch.dtype | None, kwargs: dict[str, Any]
) -> None:
    """Raises MaskError if a layer's mask is malformed, or its cu_seq_lens_q is.

    Args:
        attention_mask: as `fcore_attention` takes it.
        shape: `[B, Hq, Q, S]` of its scores.
        dtype: of its queries, None if that is not known yet.
        kwargs: the layer's other arguments.
    """
    if attention_mask is not None and not isinstance(attention_mask, Tensor):
        raise _mask_error(f"a {type(attention_mask).__name__}")
    if kwargs.get("cu_seq_lens_q") is not None:
        has_past = shape[2] != shape[3]
        check_sequence_bounds(kwargs["cu_seq_lens_q"], kwargs.get("cu_seq_lens_k"), attention_mask, has_past=has_past)
    if attention_mask is None or is_sequence_bounds(attention_mask) or is_flag(attention_mask):
        return
    if attention_mask.dtype != torch.int32:
        check_dense_mask(attention_mask, shape, dtype)
    elif attention_mask.shape != (shape[0], 1, 1, 2):
        raise _mask_error(f"int32 {list(attention_mask.shape)}")


def check_early(attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A forward pre-hook of a transformers attention: raises what `fcore_attention` is going to, if that attends."""
    config: Any = attention.config
    if config._attn_implementation != ATTENTION_NAME:
        return
    hidden_states: Tensor = args[0] if args else kwargs["hidden_states"]
    check_options(getattr(attention, "attention_dropout", 0.0) if attention.training else 0.0, kwargs)
    check_no_gradients(hidden_states, *attention.parameters())
    attention_mask = kwargs.get("attention_mask")
    if attention_mask is None and kwargs.get("cu_seq_lens_q") is None:
        return
    batch, query_len = hidden_states.shape[:2]
    # GPT-NeoX calls it so.
    past: Any = kwargs.get("past_key_values", kwargs.get("layer_past"))
    kv_len = query_len if past is None else past.get_mask_sizes(query_len, attention.layer_idx)[0]
    has_own_dtype = not torch.is_autocast_enabled(hidden_states.device.type)
    shape = (batch, config.num_attention_heads, query_len, kv_len)
    check_mask(attention_mask, shape, hidden_states.dtype if has_own_dtype else None, kwargs)


def guard_caches(model: nn.Module) -> None:
    """Has the model's first attention ask ahead."""
    # What transformers gives every attention, and nothing else.
    first = next((module for module in model.modules() if hasattr(module, "scaling")), None)
    if first is not None:
        setattr(first, _HANDLE, first.register_forward_pre_hook(check_early, with_kwargs=True))


def unguard_caches(model: nn.Module) -> None:
    """Undoes `guard_caches`."""
    for module in model.modules():
        if _HANDLE in vars(module):
            getattr(module, _HANDLE).remove()
            delattr(module, _HANDLE)


def _mask_error(got: str) -> MaskError:
    return MaskError.explain(
        "attention_mask",
        expected="a 2-D padding mask, a 4-D mask of bool or float, or int32 [B, 1, 1, 2] of (start, end)",
        got=got,
        fix="Pass what the tokenizer returns.",
    )
