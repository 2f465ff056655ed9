"""What is kept between calls: how many steps, for how long, and when they are dropped."""

from __future__ import annotations

import gc
import threading
import weakref
from typing import Any

import pytest
import torch
from torch import nn

from flashcore_ops import free_kept_caches, kept_steps, make_static_cache, warmup
from flashcore_ops.decode_step import DecodeStep, greedy, make_decode_step
from flashcore_ops.errors import OptionError
from flashcore_ops.generation import generate_tokens
from flashcore_ops.integrations.transformers import replace_llama_attention_with_flashcore as patch
from flashcore_ops.integrations.transformers import restore_attention
from flashcore_ops.kept_steps import MAX_KEPT, KeptSteps, capacity_for
from flashcore_ops.kept_steps import kept_steps as steps_of
from tests.integrations.models import make_batch, make_model


def get(model: Any, batch_size: int = 1, capacity: int = 256) -> DecodeStep:
    steps = steps_of(model)
    with steps.turn():
        return steps.get(model, batch_size, capacity)


@pytest.mark.parametrize(
    ("num_tokens", "capacity"),
    [(1, 256), (255, 256), (256, 256), (257, 512), (512, 512), (513, 1024), (131072, 131072)],
)
def test_capacities_climb_by_doubling(num_tokens: int, capacity: int) -> None:
    assert capacity_for(num_tokens) == capacity


def test_a_shape_is_made_once_and_comes_back_empty() -> None:
    model, batch = patch(make_model()), make_batch()
    step = get(model)
    model(**batch, past_key_values=step.cache)
    again = get(model)
    assert again is step
    assert int(again.length) == 0


def test_the_least_recently_used_goes_first() -> None:
    model = patch(make_model())
    shapes = [(1, 256), (2, 256), (1, 512), (3, 256)]
    assert len(shapes) == MAX_KEPT
    first = weakref.ref(get(model, *shapes[0]))
    second = weakref.ref(get(model, *shapes[1]))
    for shape in (*shapes[2:], shapes[0], (4, 256)):
        get(model, *shape)
    assert steps_of(model).shapes() == [(1, 512), (3, 256), (1, 256), (4, 256)]
    gc.collect()
    assert first() is not None
    assert second() is None


def test_release_forgets_one_cache_alone() -> None:
    model = patch(make_model())
    step, other = get(model), get(model, batch_size=2)
    steps_of(model).release(step.cache)
    assert steps_of(model).shapes() == [(2, 256)]
    assert get(model) is not step
    assert get(model, batch_size=2) is other


def _halve(model: Any) -> None:
    model.half()


def _adapt(model: Any) -> None:
    model.model.layers[0].self_attn.register_parameter("lora", nn.Parameter(torch.zeros(1)))


def _switch_adapter(model: Any) -> None:
    model.model.layers[0].mlp.down_proj.forward = lambda hidden: 0 * hidden[..., :64]


def _hook(model: Any) -> None:
    model.model.norm.register_forward_hook(lambda module, args, output: 2 * output)


def _swap_weight(model: Any) -> None:
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone())


def _rescale(model: Any) -> None:
    model.model.layers[1].self_attn.scaling *= 2


def _truncate(model: Any) -> None:
    model.config.num_hidden_layers = 1


@pytest.mark.parametrize(
    "change", [_halve, _adapt, _switch_adapter, _hook, _swap_weight, _rescale, _truncate, nn.Module.train]
)
def test_a_model_that_changed_drops_its_steps(change: Any) -> None:
    model = patch(make_model())
    step = get(model)
    change(model)
    assert get(model) is not step


def test_weights_changed_in_place_keep_them() -> None:
    model = patch(make_model())
    step = get(model)
    model.lm_head.weight.data.mul_(2)
    assert get(model) is step


def test_free_kept_caches_and_restore_free_everything() -> None:
    model = patch(make_model())
    for free in (free_kept_caches, restore_attention):
        cache = weakref.ref(get(model).cache)
        free(model)
        gc.collect()
        assert cache() is None
        assert steps_of(model).shapes() == []


def test_kept_steps_do_not_keep_their_model() -> None:
    model = patch(make_model())
    generate_tokens(model, make_batch()["input_ids"], max_new_tokens=2)
    gone, cache = weakref.ref(model), weakref.ref(get(model).cache)
    del model
    gc.collect()
    assert gone() is None
    assert cache() is None


def test_memory_that_runs_out_is_won_from_what_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    model, room = patch(make_model()), 1

    def make(model: Any, cache: Any) -> DecodeStep:
        if len(steps_of(model).shapes()) >= room:
            raise torch.OutOfMemoryError
        return make_decode_step(model, cache)

    monkeypatch.setattr(kept_steps, "make_decode_step", make)
    get(model)
    get(model, batch_size=2)
    assert steps_of(model).shapes() == [(2, 256)]
    room = 0
    with pytest.raises(torch.OutOfMemoryError):
        get(model, batch_size=3)
    get_again = steps_of(model)
    with get_again.turn():
        assert get_again.shapes() == []


def test_warmup_makes_the_step_that_generate_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = patch(make_model()), make_batch("left-padded")
    warmup(model, batch_size=3, capacity=300)
    step = get(model, batch_size=3, capacity=512)
    assert int(step.length) == 0
    assert steps_of(model).shapes() == [(3, 512)]
    generate_tokens(model, **batch, max_new_tokens=300)
    assert get(model, batch_size=3, capacity=512) is step


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0, "capacity": 8}, "batch_size: expected 1 or more, got 0"),
        ({"batch_size": 1, "capacity": 0}, "capacity: expected 1 or more, got 0"),
    ],
)
def test_warmup_refuses_sizes_below_one(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        warmup(patch(make_model()), **arguments)


def test_warmup_refuses_models_that_are_not_patched() -> None:
    with pytest.raises(OptionError, match="expected a patched model, got a LlamaForCausalLM that is not"):
        warmup(make_model(), batch_size=1, capacity=8)


def test_a_turn_waits_for_other_threads_alone() -> None:
    steps, order = KeptSteps(), []

    def other() -> None:
        with steps.turn():
            order.append("other")

    thread = threading.Thread(target=other, daemon=True)
    with steps.turn():
        thread.start()
        thread.join(timeout=0.05)
        with steps.turn():
            order.append("nested")
        thread.join(timeout=0.05)
        order.append("first")
    thread.join(timeout=10)
    assert order == ["nested", "first", "other"]


def test_a_turn_takes_one_step() -> None:
    model = patch(make_model())
    steps = steps_of(model)
    with steps.turn():
        kept = steps.get(model, 1, 256)
        with steps.turn():
            assert steps.get(model, 1, 256) is not kept
        assert steps.shapes() == [(1, 256)]
        assert steps.taken is kept
    assert steps.taken is None


@pytest.mark.parametrize("vocab_size", [1, 7, 96, 1024, 1031, 2050, 49152])
def test_greedy_is_argmax_with_the_first_among_equals(vocab_size: int, device: str) -> None:
    logits = torch.randint(0, 50, (5, vocab_size), device=device).float()
    expected = torch.from_numpy(logits.cpu().numpy().argmax(axis=-1, keepdims=True))
    assert torch.equal(greedy(logits).cpu(), expected)
    tokens = torch.full((5, 1), -1, device=device)
    assert greedy(logits, tokens) is tokens
    assert torch.equal(tokens.cpu(), expected)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2-window"])
def test_steps_feed_themselves(family: str) -> None:
    """A prefill and plain calls with a dynamic cache give the same logits, padding and window included."""
    model, batch = patch(make_model(family)), make_batch("left-padded")
    step = make_decode_step(model, make_static_cache(model, batch_size=3, max_cache_len=32))
    mask = batch["attention_mask"]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    prefill = model(**batch, position_ids=positions, past_key_values=step.cache)
    step.tokens.copy_(greedy(prefill.logits[:, -1]))
    padding = 13 - mask.sum(-1)
    step.start.copy_(padding)
    step.position_offset.copy_(padding)
    past = model(**batch, position_ids=positions).past_key_values
    for count in range(1, 8):
        tokens = step.tokens.clone()
        step.run()
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        inputs = {"input_ids": tokens, "attention_mask": mask, "position_ids": positions[:, -1:] + count}
        expected = model(**inputs, past_key_values=past).logits[:, -1]
        torch.testing.assert_close(step.logits, expected)
        assert torch.equal(step.tokens[:, 0], step.logits.argmax(-1))
        assert int(step.length) == 13 + count


def test_a_step_past_the_end_drops_the_token_and_gives_nan() -> None:
    model, batch = patch(make_model()), make_batch()
    step = make_decode_step(model, make_static_cache(model, batch_size=1, max_cache_len=14))
    model(**batch, past_key_values=step.cache)
    step.run()
    assert step.logits.isfinite().all()
    slots = [layer.keys.clone() for layer in step.cache.layers]
    step.run()
    assert step.logits.isnan().all()
    assert all(torch.equal(layer.keys, keys) for layer, keys in zip(step.cache.layers, slots, strict=True))
