"""make_static_cache: what it allocates and refuses, and how its one counter stands for all layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from flashcore_ops import make_static_cache
from flashcore_ops.errors import CapacityError, DeviceError, OptionError
from flashcore_ops.integrations import masks
from flashcore_ops.integrations.transformers import replace_llama_attention_with_flashcore as patch
from tests.integrations.models import FAMILIES, error_bar, generate, make_batch, make_model

LENGTHS = {"batch_size": 3, "max_cache_len": 40}


def poisoned_cache(model: Any, **sizes: int) -> Any:
    """Slots that hold no token hold NaN, which no result may show."""
    cache = make_static_cache(model, **(LENGTHS | sizes))
    for layer in cache.layers:
        layer.keys.fill_(torch.nan)
        layer.values.fill_(torch.nan)
    return cache


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("family", "shape"), [("llama", (3, 2, 40, 16)), ("qwen2-window", (3, 1, 40, 16))])
def test_slots_have_the_models_shape_dtype_and_device(
    family: str, shape: tuple[int, ...], dtype: torch.dtype, device: str
) -> None:
    model = patch(make_model(family, device, dtype))
    cache = make_static_cache(model, **LENGTHS)
    buffers = [buffer for layer in cache.layers for buffer in (layer.keys, layer.values)]
    assert len(buffers) == 4
    assert {(tuple(buffer.shape), buffer.dtype, buffer.device.type) for buffer in buffers} == {(shape, dtype, device)}
    assert len({buffer.data_ptr() for buffer in buffers}) == 4
    assert (cache.batch_size, cache.get_max_length(), cache.is_compileable) == (3, 40, True)
    assert cache.is_sliding == [False, False]


def test_one_counter_stands_for_all_layers_and_reset_touches_nothing_else() -> None:
    model, batch = patch(make_model()), make_batch("left-padded")
    cache = make_static_cache(model, **LENGTHS)
    counter = cache.layers[0].cumulative_length
    assert all(layer.cumulative_length is counter for layer in cache.layers)
    model(**batch, past_key_values=cache)
    assert int(counter) == int(cache.get_seq_length()) == 13
    addresses = [(layer.keys.data_ptr(), layer.values.data_ptr()) for layer in cache.layers]
    slots = [layer.keys.clone() for layer in cache.layers]
    cache.reset()
    assert int(cache.get_seq_length()) == 0
    assert cache.layers[0].cumulative_length is counter
    assert [(layer.keys.data_ptr(), layer.values.data_ptr()) for layer in cache.layers] == addresses
    assert all(torch.equal(layer.keys, old) for layer, old in zip(cache.layers, slots, strict=True))


def test_a_cache_made_under_inference_mode_serves_calls_outside_it() -> None:
    model, batch = patch(make_model()), make_batch("left-padded")
    with torch.inference_mode():
        cache = make_static_cache(model, **LENGTHS)
        inside = model(**batch, past_key_values=cache).logits
        cache.reset()
    assert not cache.layers[0].keys.is_inference()
    assert torch.equal(model(**batch, past_key_values=cache).logits, inside)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"batch_size": 0}, "batch_size: expected 1 or more, got 0"),
        ({"max_cache_len": 0}, "max_cache_len: expected 1 or more, got 0"),
        ({"max_cache_len": -5}, "max_cache_len: expected 1 or more, got -5"),
    ],
)
def test_sizes_below_one_are_refused(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        make_static_cache(make_model(), **(LENGTHS | sizes))


def test_a_model_on_several_devices_is_refused() -> None:
    model = make_model()
    model.lm_head.to("meta")
    with pytest.raises(DeviceError, match="one device, got cpu, meta"):
        make_static_cache(model, **LENGTHS)


@pytest.mark.parametrize("kind", ["single", "left-padded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_generate_over_it_gives_hugging_faces_tokens(family: str, kind: str, device: str) -> None:
    """Twice, with a longer and a shorter prompt, since slots of the first call stay behind."""
    model, batch = make_model(family, device), make_batch(kind, device)
    shorter = {name: tensor[:, -7:] for name, tensor in batch.items()}
    expected = [generate(model, inputs, past_key_values=DynamicCache()) for inputs in (batch, shorter)]
    cache = poisoned_cache(patch(model), batch_size=len(batch["input_ids"]))
    for inputs, tokens in zip((batch, shorter), expected, strict=True):
        cache.reset()
        assert generate(model, inputs, past_key_values=cache).tolist() == tokens.tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_chunks_give_the_logits_of_one_pass(family: str, device: str) -> None:
    model, batch = make_model(family, device), make_batch("left-padded", device)
    exact, bar = error_bar(model, model(**batch).logits, **batch)
    cache, logits, first = poisoned_cache(patch(model)), [], 0
    for num_tokens in (6, 1, 1, 3, 2):
        last = first + num_tokens
        inputs = {"input_ids": batch["input_ids"][:, first:last], "attention_mask": batch["attention_mask"][:, :last]}
        logits.append(model(**inputs, past_key_values=cache).logits)
        first = last
    errors = (torch.cat(logits, dim=1).double() - exact).abs()
    assert errors[batch["attention_mask"].bool()].max() <= bar


def _written(cache: Any) -> list[Tensor]:
    return [buffer.clone() for layer in cache.layers for buffer in (layer.keys, layer.values, layer.cumulative_length)]


@pytest.mark.parametrize("num_tokens", [1, 4])
def test_the_last_slot_is_used_and_what_comes_after_is_refused_unwritten(num_tokens: int) -> None:
    model, batch = patch(make_model()), make_batch("left-padded")
    cache = make_static_cache(model, batch_size=3, max_cache_len=14)
    model(**batch, past_key_values=cache)
    assert model(batch["input_ids"][:, :1], past_key_values=cache).logits.isfinite().all()
    before = _written(cache)
    with pytest.raises(CapacityError, match=f"room for {14 + num_tokens} tokens, got a static cache of 14 slots"):
        model(batch["input_ids"][:, :num_tokens], past_key_values=cache)
    assert all(map(torch.equal, _written(cache), before))


def test_a_prefill_longer_than_the_cache_is_refused_unwritten(device: str) -> None:
    model, batch = patch(make_model(device=device)), make_batch("left-padded", device)
    cache = make_static_cache(model, batch_size=3, max_cache_len=8)
    with pytest.raises(CapacityError, match="room for 13 tokens, got a static cache of 8 slots"):
        model(**batch, past_key_values=cache)
    assert int(cache.get_seq_length()) == 0
    assert all(not layer.keys.any() for layer in cache.layers)


def test_a_second_prefill_past_the_end_is_refused_where_reading_waits_too(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU's length costs a wait, which several tokens at once are worth."""
    monkeypatch.setattr(masks, "_reading_waits", lambda tensor: True)
    model, batch = patch(make_model(device=device)), make_batch("left-padded", device)
    cache = make_static_cache(model, batch_size=3, max_cache_len=20)
    model(**batch, past_key_values=cache)
    before = _written(cache)
    with pytest.raises(CapacityError, match="room for 26 tokens, got a static cache of 20 slots"):
        model(input_ids=batch["input_ids"], past_key_values=cache)
    assert all(map(torch.equal, _written(cache), before))


@pytest.mark.parametrize("truncate", ["layers", "config"])
@pytest.mark.parametrize("num_tokens", [1, 2])
def test_models_that_run_fewer_layers_count_all_the_same(device: str, truncate: str, num_tokens: int) -> None:
    model, ids = make_model("llama", device), make_batch("single", device)["input_ids"]
    if truncate == "layers":
        model.model.layers = model.model.layers[:1]
    patch(model)
    cache, growing = make_static_cache(model, batch_size=1, max_cache_len=40), DynamicCache()
    if truncate == "config":
        model.config.num_hidden_layers = 1
    with torch.no_grad():
        for first in range(0, 6, num_tokens):
            chunk = ids[:, first : first + num_tokens]
            logits = model(chunk, past_key_values=cache).logits
            expected = model(chunk, past_key_values=growing).logits
            torch.testing.assert_close(logits, expected)
    assert int(cache.get_seq_length()) == 6
