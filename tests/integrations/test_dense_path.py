"""The dense path: every kind of mask that is not left padding gives what Hugging Face's attention makes of it."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.masking_utils import create_causal_mask

from flashcore_ops.integrations import attention
from flashcore_ops.integrations.transformers import replace_llama_attention_with_flashcore as patch
from tests.integrations.models import (
    ALL_BATCHES,
    CACHES,
    FAMILIES,
    PROMPT_LEN,
    VOCABULARY,
    error_bar,
    generate,
    make_batch,
    make_model,
)
from tests.integrations.test_static_cache import poisoned_cache

HOLES = torch.tensor([[1, 1, 0, 1, 1, 0, 1, 1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1, 1, 0, 1, 1, 1, 1]])


def _dense_batch(kind: str, device: str = "cpu") -> dict[str, Tensor]:
    batch = make_batch("right-padded", device)
    if kind == "holes":
        batch = {"input_ids": batch["input_ids"][:2], "attention_mask": HOLES.to(device)}
    return batch


def _with_one_warning(reason: str, call: Any) -> Any:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = call()
    ours = [str(warning.message) for warning in caught if "FlashCore" in str(warning.message)]
    assert len(ours) == 1
    assert reason in ours[0]
    return result


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["right-padded", "holes"])
def test_right_padding_and_holes_take_the_dense_path(kind: str, family: str, cache: str, device: str) -> None:
    """Prefill and every decode step, since right padding in the prompt is a hole from then on."""
    model, batch = make_model(family, device), _dense_batch(kind, device)
    expected = generate(model, batch, cache_implementation=cache)
    patch(model)
    actual = _with_one_warning("right padding or holes", lambda: generate(model, batch, cache_implementation=cache))
    assert actual.tolist() == expected.tolist()


@pytest.mark.filterwarnings("ignore:FlashCore")
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("family", FAMILIES)
def test_padding_of_real_tokens(family: str, cache: str, device: str) -> None:
    """The embedding of padding is zeros. Behind more padding than the window, where a row sees nothing, eager
    attention takes the mean of all values, so those of other tokens show."""
    model, batch = make_model(family, device), make_batch("right-padded", device)
    tokens = torch.randint(2, VOCABULARY, batch["input_ids"].shape, generator=torch.Generator().manual_seed(1))
    batch["input_ids"] = tokens.to(device)
    expected = generate(model, batch, cache_implementation=cache)
    assert generate(patch(model), batch, cache_implementation=cache).tolist() == expected.tolist()


@pytest.mark.filterwarnings("ignore:FlashCore")
@pytest.mark.parametrize("kind", ["right-padded", "holes"])
@pytest.mark.parametrize("family", FAMILIES)
def test_slots_that_no_row_sees_may_hold_nan(family: str, kind: str, device: str) -> None:
    model, batch = make_model(family, device), _dense_batch(kind, device)
    expected = generate(model, batch, past_key_values=DynamicCache())
    cache = poisoned_cache(patch(model), batch_size=len(batch["input_ids"]))
    assert generate(model, batch, past_key_values=cache).tolist() == expected.tolist()


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_logits_of_right_padded_batches_are_those_of_sdpa(family: str, device: str) -> None:
    model, batch = make_model(family, device), make_batch("right-padded", device)
    expected = model(**batch).logits
    actual = _with_one_warning("right padding or holes", lambda: patch(model)(**batch).logits)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("dropped", ["softcap", "sinks"])
@pytest.mark.parametrize("family", ["gemma2", "gpt-oss"])
def test_the_dense_path_computes_softcap_and_sinks(family: str, dropped: str, device: str) -> None:
    """To within the error bar of eager; and not without the one that the family has."""
    model, batch = make_model(family, device), make_batch("right-padded", device)
    rows = batch["attention_mask"].bool()
    exact, bar = error_bar(model, model(**batch).logits, **batch)
    patch(model)
    logits = _with_one_warning("right padding or holes", lambda: model(**batch).logits)
    assert (logits - exact)[rows].abs().max() <= bar
    with pytest.MonkeyPatch.context() as patcher:
        whole = attention.dense_attention
        patcher.setattr(attention, "dense_attention", lambda *args, **rest: whole(*args, **(rest | {dropped: None})))
        is_used = (family, dropped) in (("gemma2", "softcap"), ("gpt-oss", "sinks"))
        assert ((model(**batch).logits - exact)[rows].abs().max() > 100 * bar) == is_used


def test_the_warning_comes_once_for_each_reason() -> None:
    model, batch = patch(make_model()), make_batch("right-padded")
    mask = torch.ones(1, 1, PROMPT_LEN, PROMPT_LEN, dtype=torch.bool)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for other in (model, patch(make_model("mistral"))):
            other(**batch)
            other(batch["input_ids"], attention_mask=mask)
    reasons = [str(warning.message) for warning in caught if "FlashCore" in str(warning.message)]
    assert ["right padding" in reason for reason in reasons] == [True, False]
    assert "4-D attention mask" in reasons[1]


LOWEST = torch.finfo(torch.float32).min
MASKS_4D = ("prefix-LM", "documents", "per head", "same for every token")


def _mask_4d(kind: str, device: str) -> Tensor:
    """A user's own mask, bool `[1, 1 or 4, 13 or 1, 13]`: each is another than the causal one."""
    tokens = torch.arange(PROMPT_LEN, device=device)
    causal = tokens[:, None] >= tokens
    masks = {
        "prefix-LM": causal | (tokens < 6),
        "documents": causal & (tokens[:, None] // 7 == tokens // 7),
        "per head": torch.stack([causal & (tokens[:, None] - tokens < width) for width in (1, 3, 5, 13)]),
        "same for every token": (tokens != 4)[None],
    }
    mask = masks[kind]
    return mask[None] if mask.dim() == 3 else mask[None, None]


def _added(mask: Tensor, hidden: float) -> Tensor:
    return torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, hidden)


@pytest.mark.parametrize("hidden", [None, -torch.inf, LOWEST], ids=["bool", "inf", "lowest"])
@pytest.mark.parametrize("kind", MASKS_4D)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_users_4d_mask_is_obeyed(family: str, kind: str, hidden: float | None, device: str) -> None:
    """As bool, or added to the scores. Eager attention adds what is passed, True and False too: it gets numbers."""
    model, ids = make_model(family, device), make_batch(device=device)["input_ids"]
    if kind == "per head" and model.config.num_attention_heads != 4:
        pytest.skip("the mask is for 4 heads")
    mask = _mask_4d(kind, device)
    added = _added(mask, -torch.inf if hidden is None else hidden)
    expected = model(input_ids=ids, attention_mask=added).logits
    patch(model)
    passed = mask if hidden is None else added
    actual = _with_one_warning("4-D attention mask", lambda: model(input_ids=ids, attention_mask=passed).logits)
    torch.testing.assert_close(actual, expected)
    assert (actual - model(input_ids=ids).logits).abs().max() > 0.1


@pytest.mark.filterwarnings("ignore:FlashCore")
@pytest.mark.parametrize("hidden", [None, -torch.inf], ids=["bool", "inf"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_prefix_lm_goes_on_over_a_static_cache(family: str, hidden: float | None, device: str) -> None:
    """The prompt's prefix sees itself, later tokens hide one of it; slots to come hold NaN."""
    model, ids = make_model(family, device), make_batch(device=device)["input_ids"]
    masks = [_mask_4d("prefix-LM", device)]
    for length in (PROMPT_LEN + 1, PROMPT_LEN + 2):
        masks.append(torch.arange(length, device=device)[None, None, None] != 3)
    tokens = [ids, ids[:, :1], ids[:, 1:2]]

    def run(cache: Any, masks: list[Tensor]) -> Tensor:
        calls = zip(tokens, masks, strict=True)
        return torch.cat([model(one, attention_mask=mask, past_key_values=cache).logits for one, mask in calls], dim=1)

    expected = run(DynamicCache(), [_added(mask, -torch.inf) for mask in masks])
    cache = poisoned_cache(patch(model), batch_size=1)
    wide = [torch.nn.functional.pad(mask, (0, 40 - mask.shape[3])) for mask in masks]
    actual = run(cache, wide if hidden is None else [_added(mask, hidden) for mask in wide])
    torch.testing.assert_close(actual, expected)


def test_a_users_own_mask_function_is_obeyed() -> None:
    """transformers' hook for models that add to the causal mask: here, token 0 is hidden from everyone."""
    model = make_model()
    arguments: dict[str, Any] = {
        "inputs_embeds": torch.zeros(2, 4, 1),
        "attention_mask": torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]]),
        "past_key_values": None,
        "and_mask_function": lambda batch, head, query, key: key > 0,
    }
    expected = create_causal_mask(model.config, **arguments)
    patch(model)
    actual = _with_one_warning("custom mask function", lambda: create_causal_mask(model.config, **arguments))
    assert torch.equal(actual.bool(), expected)


@pytest.mark.parametrize("kind", ALL_BATCHES)
@pytest.mark.parametrize("family", FAMILIES)
def test_bidirectional_models_take_the_dense_path(family: str, kind: str, device: str) -> None:
    model, batch = make_model(family, device), make_batch(kind, device)
    rows = batch["attention_mask"].bool()
    causal = model(**batch, use_cache=False).logits
    model.config.is_causal = False
    exact, bar = error_bar(model, model(**batch, use_cache=False).logits, **batch, use_cache=False)
    actual = _with_one_warning("bidirectional", lambda: patch(model)(**batch, use_cache=False).logits)
    assert (actual.double() - exact)[rows].abs().max() <= bar
    assert (actual - causal)[rows].abs().max() > 0.1
