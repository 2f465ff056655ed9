"""Masks: every one that transformers can make is served exactly, by our kernels or by the dense path."""

from __future__ import annotations

import gc
import warnings
from typing import Any

import pytest

pytest.importorskip("hypothesis")

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache
from transformers.masking_utils import (
    causal_mask_function,
    create_causal_mask,
    packed_sequence_mask_function,
    sdpa_mask,
    sliding_window_causal_mask_function,
)

from flashcore_ops.errors import CapacityError, MaskError
from flashcore_ops.integrations import attention, masks
from flashcore_ops.integrations.masks import create_fcore_mask
from flashcore_ops.integrations.transformers import replace_llama_attention_with_flashcore as patch
from flashcore_ops.reference import visible_slots
from tests.integrations.models import WINDOW_FAMILIES, error_bar, generate, make_batch, make_model, static_cache


def _visible(mask: Tensor | None, window: int, batch: int, q_length: int, kv_length: int) -> Tensor:
    """The boolean `[B, Q, S]` mask that `flashcore.attention` makes of what create_fcore_mask returned."""
    if mask is not None and mask.dtype == torch.uint8:
        return mask[:, 0].bool()
    kv_range = None if mask is None else mask[:, 0, 0]
    return visible_slots(q_length, kv_length, kv_range, window=window).expand(batch, -1, -1)


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_any_padding_mask_means_what_sdpa_makes_of_it(data: st.DataObject) -> None:
    """Random padding, past, window and cache, static or not: the same slots are visible as in sdpa's mask."""
    past, q_length = data.draw(st.integers(0, 4)), data.draw(st.integers(1, 4))
    window = data.draw(st.sampled_from([None, 2, 3, 5]))
    free = data.draw(st.integers(0, 3))
    dropped = data.draw(st.integers(0, max(0, past - window + 1))) if window else 0
    width = past + q_length + data.draw(st.sampled_from([0, free, -1]))
    is_padded_left = data.draw(st.booleans())
    bits = st.lists(st.booleans(), min_size=width, max_size=width)
    lengths = st.integers(0, width).map(lambda padding: [j >= padding for j in range(width)])
    rows = data.draw(st.lists(lengths if is_padded_left else bits, min_size=1, max_size=3))
    is_static = data.draw(st.booleans())
    arguments: dict[str, Any] = {
        "batch_size": len(rows),
        "q_length": q_length,
        "kv_length": past + q_length + free - dropped,
        "q_offset": torch.tensor(past) if is_static else past,
        "kv_offset": dropped,
        "mask_function": causal_mask_function if window is None else sliding_window_causal_mask_function(window),
        "attention_mask": torch.tensor(rows, dtype=torch.bool),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        actual = create_fcore_mask(**arguments, local_size=window)
    expected = sdpa_mask(**arguments, allow_is_causal_skip=False)[:, 0]
    visible = _visible(actual, window or 0, len(rows), q_length, arguments["kv_length"])
    assert torch.equal(visible, expected)
    if is_padded_left and width >= past + q_length:
        assert actual is None or actual.dtype == torch.int32


def test_end_is_not_the_live_counter_of_the_cache() -> None:
    counter = torch.tensor(4)
    mask = create_fcore_mask(batch_size=1, q_length=1, kv_length=8, q_offset=counter)
    counter.add_(1)
    assert mask is not None
    assert mask.tolist() == [[[[0, 5]]]]


HOLES = torch.tensor([[1, 1, 0, 1, 1, 0, 1, 1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1, 1, 0, 1, 1, 1, 1]])


def _with_one_warning(reason: str, call: Any) -> Any:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = call()
    ours = [str(warning.message) for warning in caught if "FlashCore" in str(warning.message)]
    assert len(ours) == 1
    assert reason in ours[0]
    return result


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2-window", "gemma2", "gpt-oss"])
@pytest.mark.parametrize("kind", ["right-padded", "holes"])
def test_right_padding_and_holes_take_the_dense_path(kind: str, family: str, cache: str, device: str) -> None:
    """Prefill and every decode step, since right padding in the prompt is a hole from then on."""
    model, batch = make_model(family, device), make_batch("right-padded", device)
    if kind == "holes":
        batch = {"input_ids": batch["input_ids"][:2], "attention_mask": HOLES.to(device)}
    expected = generate(model, batch, cache_implementation=cache)
    patch(model)
    actual = _with_one_warning("right padding or holes", lambda: generate(model, batch, cache_implementation=cache))
    assert actual.tolist() == expected.tolist()


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


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_a_users_4d_mask_is_obeyed(dtype: torch.dtype, device: str) -> None:
    """Blocks of two documents, as bool or added to the scores."""
    model, ids = make_model(device=device), make_batch(device=device)["input_ids"]
    document = torch.arange(13, device=device) // 7
    mask = (document[:, None] == document) & torch.ones(13, 13, dtype=torch.bool, device=device).tril()
    if dtype != torch.bool:
        mask = torch.zeros(13, 13, device=device).masked_fill(~mask, float("-inf"))
    inputs = {"input_ids": ids, "attention_mask": mask[None, None]}
    expected = model(**inputs).logits
    actual = _with_one_warning("4-D attention mask", lambda: patch(model)(**inputs).logits)
    assert torch.equal(actual, expected)
    assert not torch.allclose(actual, model(input_ids=ids).logits)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
@pytest.mark.parametrize("family", ["gemma2", "gpt-oss"])
def test_a_users_4d_mask_is_obeyed_beside_softcap_and_sinks(family: str, dtype: torch.dtype, device: str) -> None:
    """Eager attention adds what is passed, True and False too, so it is given numbers."""
    model, ids = make_model(family, device), make_batch(device=device)["input_ids"]
    mask = torch.ones(1, 1, 13, 13, dtype=torch.bool, device=device).tril()
    mask[..., 1:, 3:5] = False
    mask[..., 3:5, 3:5] |= torch.eye(2, dtype=torch.bool, device=device)
    added = torch.zeros(1, 1, 13, 13, device=device).masked_fill(~mask, float("-inf"))
    expected = model(input_ids=ids, attention_mask=added).logits
    patch(model)
    passed = mask if dtype == torch.bool else added
    actual = _with_one_warning("4-D attention mask", lambda: model(input_ids=ids, attention_mask=passed).logits)
    torch.testing.assert_close(actual, expected)
    assert not torch.allclose(actual, model(input_ids=ids).logits)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.filterwarnings("ignore:FlashCore")
def test_mask_functions_are_told_apart_by_what_they_close_over(window: int | None) -> None:
    plain = causal_mask_function if window is None else sliding_window_causal_mask_function(window)
    others = (
        packed_sequence_mask_function(torch.tensor([[0, 0, 1, 1]])),
        sliding_window_causal_mask_function(2),
        lambda batch, head, query, key: key >= 0,
    )
    size: dict[str, Any] = {"batch_size": 1, "q_length": 4, "kv_length": 4, "local_size": window}
    assert create_fcore_mask(**size, mask_function=plain) is None
    for other in others:
        mask = create_fcore_mask(**size, mask_function=other)
        assert mask is not None
        assert mask.dtype == torch.uint8


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


def test_bidirectional_models_take_the_dense_path() -> None:
    model, batch = make_model(), make_batch("left-padded")
    model.config.is_causal = False
    expected = model(**batch, use_cache=False).logits
    actual = _with_one_warning("bidirectional", lambda: patch(model)(**batch, use_cache=False).logits)
    assert torch.equal(actual, expected)


@pytest.mark.filterwarnings("ignore:FlashCore")
def test_a_mask_that_leaves_out_the_newest_tokens_is_obeyed() -> None:
    """The prompt's mask, passed again at a decode step, hides the new token, from sdpa and from us."""
    logits = []
    for is_ours in (False, True):
        model, batch = make_model(), make_batch()
        if is_ours:
            patch(model)
        past = DynamicCache(config=model.config)
        model(**batch, past_key_values=past)
        step = {"input_ids": batch["input_ids"][:, :1], "attention_mask": batch["attention_mask"]}
        logits.append(model(**step, past_key_values=past).logits)
    assert torch.equal(*logits)


def test_a_fixed_width_mask_serves_a_static_cache(device: str) -> None:
    """A mask as wide as the cache, ones for slots to come, is left padding all the same."""
    model, batch = make_model(device=device), make_batch("left-padded", device)
    expected = generate(model, batch, max_new_tokens=4)
    patch(model)
    mask = torch.nn.functional.pad(batch["attention_mask"], (0, 40 - 13), value=1)
    positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    past = static_cache(model)
    tokens = model(batch["input_ids"], attention_mask=mask, position_ids=positions, past_key_values=past)
    made = [tokens.logits[:, -1:].argmax(-1)]
    for _ in range(3):
        positions = positions[:, -1:] + 1
        step = model(made[-1], attention_mask=mask, position_ids=positions, past_key_values=past)
        made.append(step.logits[:, -1:].argmax(-1))
    assert torch.cat(made, dim=1).tolist() == expected.tolist()


def test_a_models_record_goes_with_it() -> None:
    model = patch(make_model("qwen2-window"))
    model(**make_batch("left-padded"))
    assert list(masks._left_padded) == [id(model.config)]
    del model
    gc.collect()
    assert masks._left_padded == {}


class TestDecodeStepsOnAGpu:
    """Reading a mask on the host waits for the GPU, so decode steps leave the check to the device.

    On the CPU these tests pretend that reading has its price there too.
    """

    @pytest.fixture(autouse=True)
    def _reading_has_a_price(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(masks, "_reading_waits", lambda tensor: True)

    @staticmethod
    def _mask(rows: list[list[int]], q_length: int, device: str) -> Tensor | None:
        mask = torch.tensor(rows, dtype=torch.bool, device=device)
        width = mask.shape[1]
        sizes = {"batch_size": len(rows), "q_length": q_length, "kv_length": width}
        return create_fcore_mask(**sizes, q_offset=width - q_length, attention_mask=mask, device=device)

    @pytest.mark.parametrize("cache", ["dynamic", "static"])
    def test_the_device_checks_them(self, cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
        model, batch = make_model(), make_batch("left-padded")
        expected = generate(model, batch, cache_implementation=cache)
        flags = []
        monkeypatch.setattr(torch, "_assert_async", lambda flag, message: flags.append(bool(flag)))
        actual = generate(patch(model), batch, cache_implementation=cache)
        assert actual.tolist() == expected.tolist()
        assert flags == [True] * 11  # 12 tokens: the first is the prefill's

    @pytest.mark.gpu
    def test_they_do_not_wait(self) -> None:
        self._mask([[0, 1, 1]], q_length=3, device="cuda")
        step = torch.ones(1, 4, dtype=torch.bool, device="cuda")
        torch.cuda.set_sync_debug_mode("error")
        try:
            sizes = {"batch_size": 1, "q_length": 1, "kv_length": 4, "q_offset": 3}
            create_fcore_mask(**sizes, attention_mask=step, device="cuda")
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def test_another_batch_is_looked_at(self, device: str) -> None:
        self._mask([[0, 1, 1], [1, 1, 1]], q_length=3, device=device)
        with pytest.warns(UserWarning, match="right padding or holes"):
            mask = self._mask([[1, 1, 0, 1]], q_length=1, device=device)
        assert mask is not None
        assert mask.dtype == torch.uint8

    def test_a_mask_that_follows_none_is_looked_at(self, device: str) -> None:
        with pytest.warns(UserWarning, match="right padding or holes"):
            assert self._mask([[1, 1, 0, 1]], q_length=1, device=device) is not None

    def test_every_prefill_is_looked_at(self, device: str) -> None:
        self._mask([[0, 1, 1]], q_length=3, device=device)
        with pytest.warns(UserWarning, match="right padding or holes"):
            mask = self._mask([[1, 0, 1]], q_length=3, device=device)
        assert mask is not None
        assert mask.dtype == torch.uint8

    def test_a_bad_prefill_ends_the_trust_that_a_good_one_of_its_shape_earned(self, device: str) -> None:
        self._mask([[0, 1, 1]], q_length=3, device=device)
        with pytest.warns(UserWarning, match="right padding or holes"):
            self._mask([[1, 1, 0]], q_length=3, device=device)
        mask = self._mask([[1, 1, 0, 1]], q_length=1, device=device)
        assert mask is not None
        assert mask.dtype == torch.uint8

    def test_holes_that_come_after_a_good_prefill_raise(self) -> None:
        self._mask([[0, 1, 1]], q_length=3, device="cpu")
        with pytest.raises(RuntimeError, match="which its prefill had not"):
            self._mask([[0, 1, 0, 1]], q_length=1, device="cpu")


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(2, 13), r"expected \[B, L\] with B = 1"),
        (torch.ones(1, 3, 13), r"expected \[B, L\] with B = 1"),
        (torch.ones(1, 1, 13, 12, dtype=torch.bool), r"broadcasts to \[B, Hq, Q, S\]"),
        (torch.ones(1, 1, 13, 12, dtype=torch.uint8), r"broadcasts to \[B, Hq, Q, S\]"),
        (torch.ones(1, 1, 13, 13, dtype=torch.int64), "dtype bool"),
        (torch.ones(1, 1, 13, 13, dtype=torch.float16), "dtype bool"),
        (torch.ones(1, 1, 13, 13, dtype=torch.int32), "2-D padding mask"),
    ],
)
def test_malformed_masks_are_refused(mask: Tensor, message: str) -> None:
    with pytest.raises(MaskError, match=message):
        patch(make_model())(make_batch()["input_ids"], attention_mask=mask)


@pytest.mark.parametrize("chunk", [1, 3])
@pytest.mark.parametrize("family", WINDOW_FAMILIES)
def test_a_static_cache_that_drops_what_the_window_shows_is_refused(family: str, chunk: int) -> None:
    """Of 6 slots and a window of 8, transformers' sliding layers drop the oldest tokens, and it goes on."""
    model, ids = patch(make_model(family)), make_batch()["input_ids"]
    cache = static_cache(model, max_cache_len=6)
    model(ids[:, :6], past_key_values=cache)
    with pytest.raises(CapacityError, match=r"past_key_values: .*larger max_cache_len"):
        model(ids[:, 6 : 6 + chunk], past_key_values=cache)


OVERFLOW = r"^past_key_values: expected room for 13 tokens, got a static cache of 8 slots\."


def test_prefill_past_the_static_cache_is_refused_before_anything_is_written(device: str) -> None:
    model = patch(make_model(device=device))
    cache = static_cache(model, max_cache_len=8)
    with pytest.raises(CapacityError, match=OVERFLOW):
        model(torch.arange(3, 16, device=device)[None], past_key_values=cache)
    assert int(cache.get_seq_length()) == 0


def test_decode_past_the_static_cache_is_refused_on_the_cpu() -> None:
    model = patch(make_model())
    cache = static_cache(model, max_cache_len=8)
    model(torch.arange(3, 8)[None], past_key_values=cache)
    before = [layer.keys.clone() for layer in cache.layers]
    with pytest.raises(CapacityError, match=OVERFLOW):
        model(torch.arange(3, 11)[None], past_key_values=cache)
    assert all(torch.equal(layer.keys, keys) for layer, keys in zip(cache.layers, before, strict=True))
    assert int(cache.get_seq_length()) == 5
