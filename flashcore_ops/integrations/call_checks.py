"""What the call of a layer's attention is refused for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flashcore_ops.errors import MaskError, OptionError, UnsupportedModelError
from flashcore_ops.integrations.dense import check_dense_mask
from flashcore_ops.integrations.packing import check_sequence_bounds, is_flag, is_sequence_bounds

# On the masks that are ours.
_MARK = "_flashcore_channel"

# Fused layers serve none of them; `fcore_attention` has the first two as arguments of its own.
_UNSERVED_FEATURES = ("softcap", "s_aux", "position_bias")


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


def mark_channel(mask: Tensor) -> Tensor:
    """Marks an int32 mask as ours, for `check_not_a_channel`. One that is made while tracing is no caller's."""
    if not torch.compiler.is_compiling():
        setattr(mask, _MARK, True)
    return mask


def check_not_a_channel(mask: Any) -> None:
    """Raises MaskError for a caller's own int32 mask in four dimensions, which by its shape could be one of ours.

    Those that come from the caller all the same are what `generate` had us make.
    """
    is_like_ours = isinstance(mask, Tensor) and mask.dim() == 4 and mask.dtype == torch.int32
    if is_like_ours and not getattr(mask, _MARK, False):
        raise _mask_error(f"int32 {list(mask.shape)}")


def _mask_error(got: str) -> MaskError:
    return MaskError.explain(
        "attention_mask",
        expected="a 2-D padding mask, or a 4-D mask of bool or float",
        got=got,
        fix="Pass what the tokenizer returns.",
    )
