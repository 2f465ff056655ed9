"""Masks: every one that transformers can make is read exactly, for our kernels or for the dense path."""

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
    packed_sequence_mask_function,
    sdpa_mask,
    sliding_window_causal_mask_function,
)

from flashcore_ops.errors import CapacityError, MaskError
from flashcore_ops.integrations import masks
from flashcore_ops.integrations.masks import create_fcore_mask
from flashcore_ops.integrations.transformers import replace_llama_attention_with_flashcore as patch
from flashcore_ops.reference import visible_slots
from tests.integrations.models import WINDOW_FAMILIES, generate, make_batch, make_model, static_cache


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
        # Of the shapes that ours have.
        (torch.ones(1, 1, 1, 13, dtype=torch.int32), "2-D padding mask"),
        (torch.zeros(1, 1, 1, 2, dtype=torch.int32), "2-D padding mask"),
        (torch.ones(1, 1, 1, 1, dtype=torch.int32), "2-D padding mask"),
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
