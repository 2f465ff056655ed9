"""A refused call leaves the caller's cache as it was: the next call on it goes on where the last good one ended."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Cache, DynamicCache, PreTrainedModel

from flashcore_ops import make_static_cache, restore_attention
from flashcore_ops.errors import DtypeError, FlashCoreError, GradientError, MaskError, OptionError
from flashcore_ops.integrations.cache_guard import check_early
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
    return model(**inputs, attention_mask=torch.ones(*mask_shape(inputs), dtype=torch.int64))


def with_a_mask_of_another_dtype(model: PreTrainedModel, inputs: dict[str, Any]) -> Any:
    return model(**inputs, attention_mask=torch.zeros(*mask_shape(inputs), dtype=torch.float16))


def with_a_mask_too_narrow(model: PreTrainedModel, inputs: dict[str, Any]) -> Any:
    batch, heads, query_len, _ = mask_shape(inputs)
    return model(**inputs, attention_mask=torch.ones(batch, heads, query_len, 7, dtype=torch.bool))


def with_a_mask_for_each_kind_of_layer(model: PreTrainedModel, inputs: dict[str, Any]) -> Any:
    batch, heads, query_len, _ = mask_shape(inputs)
    mask = torch.ones(batch, heads, query_len, 7, dtype=torch.bool)
    kinds = set(getattr(model.config, "layer_types", None) or ()) or {"full_attention"}
    masks = dict.fromkeys(kinds, mask) if hasattr(model.config, "layer_types") else mask
    return model(**inputs, attention_mask=masks)


def with_a_mask_of_our_shape(model: PreTrainedModel, inputs: dict[str, Any]) -> Any:
    return model(**inputs, attention_mask=torch.zeros(1, 1, 1, 2, dtype=torch.int32))


def with_another_dtype(model: PreTrainedModel, inputs: dict[str, Any]) -> Any:
    try:
        return model.double()(**inputs)
    finally:
        model.float()


def mask_shape(inputs: dict[str, Any]) -> tuple[int, int, int, int]:
    query_len = inputs["input_ids"].shape[1]
    return 1, 1, query_len, inputs["past_key_values"].get_mask_sizes(query_len, 0)[0]


def packed_behind_past_tokens(model: PreTrainedModel, inputs: dict[str, Any]) -> Any:
    return model(**inputs, cu_seq_lens_q=torch.tensor([0, inputs["input_ids"].shape[1]], dtype=torch.int32))


REFUSED: dict[Call, tuple[type[FlashCoreError], str]] = {
    with_gradients: (GradientError, "no_grad"),
    in_training: (OptionError, "attention_dropout"),
    with_weights: (OptionError, "output_attentions"),
    with_a_mask_of_integers: (MaskError, "int64"),
    with_a_mask_of_another_dtype: (MaskError, "float16"),
    with_a_mask_too_narrow: (MaskError, "broadcasts"),
    with_a_mask_for_each_kind_of_layer: (MaskError, "broadcasts"),
    with_a_mask_of_our_shape: (MaskError, "int32"),
    with_another_dtype: (DtypeError, "float64"),
    packed_behind_past_tokens: (MaskError, "past tokens"),
}


def make_cache(kind: str, model: PreTrainedModel) -> Cache:
    if kind == "ours":
        return make_static_cache(model, batch_size=1, max_cache_len=40)
    return static_cache(model) if kind == "static" else DynamicCache(config=model.config)


@pytest.mark.parametrize("num_tokens", [1, 3])
@pytest.mark.parametrize("call", REFUSED, ids=lambda call: call.__name__)
@pytest.mark.parametrize("cache", [*CACHES, "ours"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_cache_is_as_it_was(family: str, cache: str, call: Call, num_tokens: int) -> None:
    model, batch = patch(make_model(family)), make_batch()
    past, twin = make_cache(cache, model), make_cache(cache, model)
    for each in (past, twin):
        model(**batch, past_key_values=each)
    error, match = REFUSED[call]
    more = {"input_ids": batch["input_ids"][:, :num_tokens]}
    with pytest.raises(error, match=match):
        call(model, more | {"past_key_values": past})
    assert {int(layer.get_seq_length()) for layer in past.layers} == {PROMPT_LEN}
    assert torch.equal(model(**more, past_key_values=past).logits, model(**more, past_key_values=twin).logits)


@pytest.mark.parametrize(
    "trained", ["embed_tokens", "layers.0.mlp", "layers.1.self_attn.v_proj", "layers.1.mlp", "norm", "lm_head"]
)
def test_only_gradients_that_an_attention_would_need_are_refused(trained: str) -> None:
    model, batch = patch(make_model()).requires_grad_(False), make_batch()
    part = model.get_submodule(trained if trained == "lm_head" else f"model.{trained}").requires_grad_()
    past = DynamicCache(config=model.config)
    with torch.enable_grad():
        if trained in ("layers.1.mlp", "norm", "lm_head"):
            model(**batch, past_key_values=past).logits.sum().backward()
            assert all(parameter.grad is not None for parameter in part.parameters())
        else:
            with pytest.raises(GradientError):
                model(**batch, past_key_values=past)
            assert past.get_seq_length() == 0


@pytest.mark.parametrize("family", ["gemma2", "qwen3", "gpt-oss"])
@pytest.mark.parametrize("cache", CACHES)
def test_a_mask_that_fits_some_layers_alone(family: str, cache: str) -> None:
    model = patch(make_model(family))
    past, ids = make_cache(cache, model), torch.randint(2, 90, (1, 20))
    model(ids, past_key_values=past)
    widths = {past.get_mask_sizes(3, i)[0] for i in range(len(past.layers))}
    assert len(widths) == 2
    for width in widths:
        with pytest.raises(MaskError, match="broadcasts"):
            model(ids[:, :3], past_key_values=past, attention_mask=torch.ones(1, 1, 3, width, dtype=torch.bool))
        assert {int(layer.get_seq_length()) for layer in past.layers} == {20}


@pytest.mark.parametrize("family", FAMILIES)
def test_arguments_by_position_are_looked_at_too(family: str) -> None:
    model = patch(make_model(family))
    stack, ids, past = model.base_model, make_batch()["input_ids"], DynamicCache(config=model.config)
    stack(ids, past_key_values=past)
    mask = torch.ones(1, 1, 3, 5, dtype=torch.bool)
    with pytest.raises(MaskError, match="broadcasts"):
        stack(ids[:, :3], mask, past_key_values=past)
    names = list(inspect.signature(stack.forward).parameters)
    arguments = [None] * (names.index("past_key_values") - 1)
    with torch.enable_grad(), pytest.raises(GradientError):
        stack(ids[:, :3], *arguments, past)
    assert {int(layer.get_seq_length()) for layer in past.layers} == {PROMPT_LEN}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_stack_of_layers_asks_and_nothing_else(family: str) -> None:
    model = patch(make_model(family))
    asking = [module for module in model.modules() if check_early in module._forward_pre_hooks.values()]
    assert asking == [model.base_model]
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        restore_attention(twin)
        assert not any(module._forward_pre_hooks for module in twin.modules())
    assert check_early in model.base_model._forward_pre_hooks.values()
    restore_attention(model)
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert vars(model.base_model).keys() == vars(make_model(family).base_model).keys()


def test_every_model_of_several_is_guarded() -> None:
    models = patch(nn.ModuleList([make_model(), make_model("phi3")]))
    for model in models:
        past = DynamicCache(config=model.config)
        with torch.enable_grad(), pytest.raises(GradientError):
            model(**make_batch(), past_key_values=past)
        assert past.get_seq_length() == 0


def test_calls_without_a_cache_are_left_to_the_attention() -> None:
    model, batch = patch(make_model()), make_batch()
    mask = torch.ones(1, 1, PROMPT_LEN, PROMPT_LEN, dtype=torch.bool).tril()
    with torch.enable_grad():
        model(batch["input_ids"], attention_mask=mask).logits.sum().backward()
    assert model.model.layers[0].self_attn.q_proj.weight.grad is not None


def test_under_autocast_the_queries_dtype_is_not_known_yet() -> None:
    model = patch(make_model())
    stack, past = model.model, DynamicCache(config=model.config)
    arguments = {"past_key_values": past, "attention_mask": torch.zeros(1, 1, 3, 3, dtype=torch.bfloat16)}
    ids = torch.zeros(1, 3, dtype=torch.int64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        check_early(stack, (ids,), arguments)
        with pytest.raises(MaskError, match="int64"):
            check_early(stack, (ids,), arguments | {"attention_mask": torch.zeros(1, 1, 3, 3, dtype=torch.int64)})
    with pytest.raises(MaskError, match="float32 to add"):
        check_early(stack, (ids,), arguments)
