"""Attention in plain torch that keeps the dtype of its inputs, so that a float64 model is one all through.

Hugging Face's eager attention takes its softmax in float32, and its sdpa leaves out softcap and sinks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

NAME = "oracle"


def use_oracle(model: PreTrainedModel) -> PreTrainedModel:
    """Makes an unpatched model compute its attention here; its config is changed."""
    AttentionInterface.register(NAME, oracle_attention)
    AttentionMaskInterface.register(NAME, oracle_mask)
    model.set_attn_implementation(NAME)
    if model._can_set_experts_implementation():
        # The grouped products of experts know no float64.
        model.set_experts_implementation("eager")
    return model


def oracle_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """bool `[B, 1, Q, S]`, window and causality included."""
    options = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    return sdpa_mask(*args, **(kwargs | options))


def oracle_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    scores = scaling * (query @ key.transpose(-1, -2))
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~attention_mask, -torch.inf)
    if s_aux is not None:
        sinks = s_aux.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat((scores, sinks), dim=-1)
    # Rows of padding see nothing: 0 in the place of 0 / 0.
    weights = scores.softmax(dim=-1)[..., : key.shape[2]].nan_to_num()
    return (weights @ value).transpose(1, 2), None
