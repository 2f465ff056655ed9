"""A refused call leaves the caller's cache as it was: the next call on it goes on where the last good one ended."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Cache, DynamicCache, PreTrainedModel

from flashcore_ops import restore_attention
from flashcore_ops.errors import FlashCoreError, GradientError, MaskError, OptionError
from flashcore_ops.integrations.call_checks import check_early
from flashcore_ops.integrations.transformers import replace_llama_attention_with_flashcore as patch
from tests.integrations.models import CACHES, FAMILIES, PROMPT_LEN, make_batch, make_model, static_cache

Call = Callable[[PreTrainedModel, dict[str, Any]], Any]


def with_gradients(model: PreTrainedModel, inputs: dict[str, Any]) -> Any:
    with torch.enable_grad():
        return model(**inputs)


def in_training(model: PreTrainedModel, inputs: dict[str, Any]) -> Any:
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.1
    try:
        return model.train()(**inputs)
    finally:
        model.eval()


def with_weights(model: PreTrainedModel, inputs: dict[str, Any]) -> Any:
    return model(**inputs, output_attentions=True)


def with_a_mask_of_integers(model: PreTrainedModel, inputs: dict[str, Any]) -> Any:
    return model(**inputs, attention_mask=torch.ones(1, 1, inputs["input_ids"].shape[1], 7, dtype=torch.int64))


def with_a_mask_too_narrow(model: PreTrainedModel, inputs: dict[str, Any]) -> Any:
    return model(**inputs, attention_mask=torch.ones(1, 1, inputs["input_ids"].shape[1], 7, dtype=torch.bool))


def packed_behind_past_tokens(model: PreTrainedModel, inputs: dict[str, Any]) -> Any:
    return model(**inputs, cu_seq_lens_q=torch.tensor([0, inputs["input_ids"].shape[1]], dtype=torch.int32))


REFUSED: dict[Call, type[FlashCoreError]] = {
    with_gradients: GradientError,
    in_training: OptionError,
    with_weights: OptionError,
    with_a_mask_of_integers: MaskError,
    with_a_mask_too_narrow: MaskError,
    packed_behind_past_tokens: MaskError,
}


def make_cache(kind: str, model: PreTrainedModel) -> Cache:
    return static_cache(model) if kind == "static" else DynamicCache(config=model.config)


@pytest.mark.parametrize("call", REFUSED, ids=lambda call: call.__name__)
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_cache_is_as_it_was(family: str, cache: str, call: Call) -> None:
    model, batch = patch(make_model(family)), make_batch()
    past, twin = make_cache(cache, model), make_cache(cache, model)
    for each in (past, twin):
        model(**batch, past_key_values=each)
    with pytest.raises(REFUSED[call]):
        call(model, {"input_ids": batch["input_ids"][:, :3], "past_key_values": past})
    assert {int(layer.get_seq_length()) for layer in past.layers} == {PROMPT_LEN}
    more = {"input_ids": batch["input_ids"][:, :3]}
    assert torch.equal(model(**more, past_key_values=past).logits, model(**more, past_key_values=twin).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_attention_asks_and_no_other(family: str) -> None:
    model = patch(make_model(family))
    asking = [module for module in model.modules() if check_early in module._forward_pre_hooks.values()]
    (first,) = asking
    assert first.layer_idx == 0
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        restore_attention(twin)
        assert not any(module._forward_pre_hooks for module in twin.modules())
    assert check_early in first._forward_pre_hooks.values()
    restore_attention(model)
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert vars(first).keys() == vars(attention_of(make_model(family))).keys()


def attention_of(model: nn.Module) -> nn.Module:
    return next(module for module in model.modules() if hasattr(module, "scaling"))


def test_under_autocast_the_queries_dtype_is_not_known_yet() -> None:
    attention = attention_of(patch(make_model()))
    hidden = torch.zeros(1, 3, attention.config.hidden_size)
    arguments = {"attention_mask": torch.zeros(1, 1, 3, 3, dtype=torch.bfloat16)}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        check_early(attention, (hidden,), arguments)
    with pytest.raises(MaskError, match="float32 to add"):
        check_early(attention, (hidden,), arguments)
