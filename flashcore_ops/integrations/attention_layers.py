"""What each layer of a model tells the attention op, read from its modules, with or without weights."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from flashcore_ops.integrations.cache_guard import attentions_of
from flashcore_ops.integrations.families import Feature, family_of
from flashcore_ops.kv_memory import KVShape


@dataclass(frozen=True)
class AttentionLayer:
    """The attention of one layer, or of several that are alike.

    Attributes:
        num_query_heads, num_kv_heads, head_dim: Hq, Hkv and D.
        scale: factor on the scores.
        window: in tokens, 0 for none.
        softcap: bound of the scores, 0.0 for none.
        has_sinks: whether a score of each head joins the denominator.
        is_causal: False if masks hide nothing behind a token; the dense path attends then.
    """

    num_query_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    window: int
    softcap: float
    has_sinks: bool
    is_causal: bool


def attention_layers(model: PreTrainedModel) -> Counter[AttentionLayer]:
    """The distinct kinds of attention in a model that `patch_model` accepts, and how many layers are of each.

    In the order of their first layers.

    Example:
        >>> from transformers import Gemma2Config, Gemma2Model
        >>> sizes = dict(vocab_size=64, hidden_size=64, intermediate_size=64, num_attention_heads=4)
        >>> model = Gemma2Model(Gemma2Config(num_hidden_layers=3, sliding_window=512, **sizes))
        >>> [(layer.window, layer.softcap, number) for layer, number in attention_layers(model).items()]
        [(512, 50.0, 2), (0, 50.0, 1)]
    """
    family = family_of(type(model))
    features = () if family is None else family.features
    config = model.config.get_text_config(decoder=True)
    shape = KVShape.of(config)
    return Counter(
        AttentionLayer(
            num_query_heads=shape.num_query_heads,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            scale=float(attention.scaling),
            window=window_of(attention) or 0,
            # Gemma 3 has the setting, and leaves it out.
            softcap=config.attn_logit_softcapping or 0.0 if Feature.SOFTCAP in features else 0.0,
            has_sinks=Feature.SINKS in features,
            is_causal=attention.is_causal and getattr(config, "is_causal", True),
        )
        for attention in attentions_of(model)
    )


def window_of(attention: Any) -> int | None:
    """The sliding window of a layer's attention in tokens, None for none: its own, or else its config's."""
    window: int | None = getattr(attention, "sliding_window", getattr(attention.config, "sliding_window", None))
    return window
