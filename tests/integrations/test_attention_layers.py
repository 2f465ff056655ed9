"""What is read from a model's modules is what its layers tell the attention op."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from flashcore_ops.integrations.attention_layers import AttentionLayer, attention_layers
from flashcore_ops.integrations.transformers import patch_model
from tests.integrations.models import FAMILIES, make_batch, make_model


def recorded(query: Tensor, key: Tensor, *arguments: Any) -> AttentionLayer:
    """The arguments of one call of the attention op."""
    _value, _kv_range, scale, is_causal, window, softcap, sinks = arguments
    return AttentionLayer(
        num_query_heads=query.shape[1],
        num_kv_heads=key.shape[1],
        head_dim=query.shape[3],
        scale=scale,
        window=window,
        softcap=softcap,
        has_sinks=sinks is not None,
        is_causal=is_causal,
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_are_as_they_call_the_op(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[AttentionLayer] = []
    attention = torch.ops.flashcore.attention

    def record(*arguments: Any) -> Any:
        calls.append(recorded(*arguments))
        return attention(*arguments)

    model = patch_model(make_model(family))
    monkeypatch.setattr(torch.ops.flashcore, "attention", record)
    model(**make_batch(), use_cache=False)
    found = attention_layers(model)
    assert found == Counter(calls)
    assert list(found) == list(Counter(calls))
    config = make_model(family).config
    with torch.device("meta"):
        outline = AutoModelForCausalLM.from_config(config)
    assert attention_layers(outline) == found


def test_a_model_that_attends_in_both_directions() -> None:
    for family, setting in (("llama", {"is_causal": False}), ("gemma3", {"use_bidirectional_attention": True})):
        config = make_model(family).config
        assert {layer.is_causal for layer in attention_layers(AutoModelForCausalLM.from_config(config))} == {True}
        config.update(setting)
        assert {layer.is_causal for layer in attention_layers(AutoModelForCausalLM.from_config(config))} == {False}


def test_gemma_3_leaves_its_softcap_out() -> None:
    model = make_model("gemma3")
    model.config.attn_logit_softcapping = 5.0
    assert {layer.softcap for layer in attention_layers(model)} == {0.0}
