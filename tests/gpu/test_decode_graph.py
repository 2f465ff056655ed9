"""DecodeGraph, and generate and stream_tokens on it: recorded once, exact, from any thread, in constant memory."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from flashcore_ops import free_kept_caches, make_static_cache, warmup
from flashcore_ops.decode_step import DecodeGraph, DecodeStep, greedy
from flashcore_ops.errors import CapacityError
from flashcore_ops.generation import Sampling, generate_tokens, stream_tokens
from flashcore_ops.integrations.transformers import replace_llama_attention_with_flashcore as patch
from flashcore_ops.kept_steps import kept_steps
from tests.gpu.recordings import Recordings, count_recordings
from tests.integrations.models import FAMILIES, PROMPT_LEN, make_batch, make_model

pytestmark = pytest.mark.gpu

NUM_STEPS = 64


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(autouse=True)
def recordings(monkeypatch: pytest.MonkeyPatch) -> Recordings:
    return count_recordings(monkeypatch)


def begin(step: DecodeStep, model: Any, batch: dict[str, Tensor]) -> None:
    """Prefills the step's cache, and sets the step to go on from there."""
    step.cache.reset()
    mask = batch["attention_mask"]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = model(**batch, position_ids=positions, past_key_values=step.cache).logits
    step.tokens.copy_(greedy(logits[:, -1]))
    step.start.copy_(PROMPT_LEN - mask.sum(-1))
    step.position_offset.copy_(PROMPT_LEN - mask.sum(-1))


def advance(step: DecodeStep, num_steps: int = NUM_STEPS) -> Tensor:
    """Logits `[steps, B, V]`."""
    logits = []
    for _ in range(num_steps):
        step.run()
        logits.append(step.logits.clone())
    return torch.stack(logits)


def sdpa_tokens(model: Any, batch: dict[str, Tensor], num_tokens: int) -> list[list[int]]:
    options = {"max_new_tokens": num_tokens, "do_sample": False, "disable_compile": True}
    return model.generate(**batch, **options)[:, PROMPT_LEN:].tolist()


@pytest.mark.parametrize("kind", ["single", "left-padded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_replay_equals_the_eager_step_bit_by_bit(family: str, dtype: torch.dtype, kind: str) -> None:
    model, batch = patch(make_model(family, "cuda", dtype)), make_batch(kind, "cuda")
    caches = [make_static_cache(model, len(batch["input_ids"]), 96) for _ in range(2)]
    results = []
    for kind_of_step, cache in zip((DecodeGraph, DecodeStep), caches, strict=True):
        step = kind_of_step(model, cache)
        begin(step, model, batch)
        results.append((advance(step), step.tokens.clone(), int(step.length)))
    assert results[0][0].isfinite().all()
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert results[0][2] == results[1][2] == PROMPT_LEN + NUM_STEPS
    for graphed, eager in zip(caches[0].layers, caches[1].layers, strict=True):
        last = PROMPT_LEN + NUM_STEPS
        assert torch.equal(graphed.keys[:, :, :last], eager.keys[:, :, :last])


def test_recording_leaves_the_cache_as_it_was() -> None:
    model, batch = patch(make_model(device="cuda")), make_batch("left-padded", "cuda")
    cache = make_static_cache(model, 3, 96)
    model(**batch, past_key_values=cache)
    before = [layer.keys[:, :, :PROMPT_LEN].clone() for layer in cache.layers]
    DecodeGraph(model, cache)
    assert int(cache.get_seq_length()) == PROMPT_LEN
    for layer, keys in zip(cache.layers, before, strict=True):
        assert torch.equal(layer.keys[:, :, :PROMPT_LEN], keys)


def test_two_graphs_alternate() -> None:
    model = patch(make_model(device="cuda"))
    batches = [make_batch("left-padded", "cuda"), make_batch("single", "cuda")]
    steps = [DecodeGraph(model, make_static_cache(model, len(batch["input_ids"]), 96)) for batch in batches]
    expected = []
    for step, batch in zip(steps, batches, strict=True):
        begin(step, model, batch)
        expected.append(advance(step))
    for step, batch in zip(steps, batches, strict=True):
        begin(step, model, batch)
    logits: list[list[Tensor]] = [[], []]
    for _ in range(NUM_STEPS):
        for step, row in zip(steps, logits, strict=True):
            row.append(advance(step, num_steps=1)[0])
    assert all(torch.equal(torch.stack(row), rows) for row, rows in zip(logits, expected, strict=True))


def test_another_thread_may_replay() -> None:
    model, batch = patch(make_model(device="cuda")), make_batch("left-padded", "cuda")
    step = DecodeGraph(model, make_static_cache(model, 3, 96))
    begin(step, model, batch)
    expected = advance(step)
    begin(step, model, batch)
    results: list[Tensor] = []
    thread = threading.Thread(target=lambda: results.append(advance(step)))
    thread.start()
    thread.join()
    assert torch.equal(results[0], expected)


def test_a_step_past_the_end_is_nan_and_leaves_the_context_alive() -> None:
    model, batch = patch(make_model(device="cuda")), make_batch("left-padded", "cuda")
    step = DecodeGraph(model, make_static_cache(model, 3, PROMPT_LEN + 2))
    begin(step, model, batch)
    logits = advance(step, num_steps=4)
    assert logits[:2].isfinite().all()
    assert logits[2:].isnan().all()
    torch.cuda.synchronize()
    begin(step, model, batch)
    assert torch.equal(advance(step, num_steps=2), logits[:2])


@pytest.mark.parametrize("kind", ["single", "left-padded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_generate_records_once_for_all_prompts(family: str, kind: str, recordings: Recordings) -> None:
    model, batch = make_model(family, "cuda"), make_batch(kind, "cuda")
    expected = sdpa_tokens(model, batch, NUM_STEPS)
    shorter = {name: tensor[:, -6:] for name, tensor in batch.items()}
    patch(model)
    options = {"max_new_tokens": NUM_STEPS, "do_sample": False}
    assert model.generate(**batch, **options)[:, PROMPT_LEN:].tolist() == expected
    assert recordings.num_graphs == 1
    model.generate(**shorter, **options)
    model.generate(**batch, do_sample=True, max_new_tokens=9)
    assert generate_tokens(model, **batch, max_new_tokens=NUM_STEPS).tolist() == expected
    assert model.generate(**batch, **options)[:, PROMPT_LEN:].tolist() == expected
    assert recordings.num_graphs == 1


@pytest.mark.parametrize("batch_size", [1, 4, 32, 40])
def test_every_batch_size_generates_what_sdpa_does(batch_size: int) -> None:
    model = make_model(device="cuda")
    ids = torch.randint(2, 96, (batch_size, PROMPT_LEN), device="cuda")
    mask = torch.ones_like(ids)
    mask[::2, :4] = 0
    batch = {"input_ids": ids * mask, "attention_mask": mask}
    expected = sdpa_tokens(model, batch, NUM_STEPS)
    assert generate_tokens(patch(model), **batch, max_new_tokens=NUM_STEPS).tolist() == expected
    output = model.generate(**batch, max_new_tokens=NUM_STEPS, do_sample=False)
    assert output[:, PROMPT_LEN:].tolist() == expected


def test_a_warm_shape_records_nothing(recordings: Recordings) -> None:
    model, batch = patch(make_model(device="cuda")), make_batch("left-padded", "cuda")
    warmup(model, batch_size=3, capacity=PROMPT_LEN + NUM_STEPS)
    assert recordings.num_graphs == 1
    model.generate(**batch, max_new_tokens=NUM_STEPS, do_sample=False)
    for _ in stream_tokens(model, **batch, max_new_tokens=NUM_STEPS):
        pass
    assert recordings.num_graphs == 1


def test_a_second_prefill_past_the_end_is_refused_unwritten() -> None:
    model, batch = patch(make_model(device="cuda")), make_batch("left-padded", "cuda")
    cache = make_static_cache(model, 3, 20)
    model(**batch, past_key_values=cache)
    before = [layer.keys.clone() for layer in cache.layers]
    with pytest.raises(CapacityError, match="room for 26 tokens, got a static cache of 20 slots"):
        model(input_ids=batch["input_ids"], past_key_values=cache)
    assert all(torch.equal(layer.keys, keys) for layer, keys in zip(cache.layers, before, strict=True))


def test_threads_and_models_do_not_disturb_each_other() -> None:
    models, batch = [make_model("llama", "cuda"), make_model("mistral", "cuda")], make_batch("left-padded", "cuda")
    expected = [sdpa_tokens(model, batch, NUM_STEPS) for model in models] * 2
    for model in models:
        patch(model)
        warmup(model, batch_size=3, capacity=PROMPT_LEN + NUM_STEPS)
    results: list[Any] = [None] * 4

    def run(index: int) -> None:
        results[index] = generate_tokens(models[index % 2], **batch, max_new_tokens=NUM_STEPS).tolist()

    threads = [threading.Thread(target=run, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == expected


def test_sampling_on_the_device_repeats_with_a_seed() -> None:
    model, batch = patch(make_model(device="cuda")), make_batch("left-padded", "cuda")
    sampling = Sampling(temperature=1.5, top_k=40, top_p=0.9)

    def draw(seed: int, steps_per_read: int) -> Tensor:
        generator = torch.Generator("cuda").manual_seed(seed)
        options: dict[str, Any] = {"sampling": sampling, "generator": generator, "steps_per_read": steps_per_read}
        return generate_tokens(model, **batch, max_new_tokens=NUM_STEPS, **options)

    assert torch.equal(draw(1, 1), draw(1, 16))
    assert not torch.equal(draw(1, 1), draw(2, 1))


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.8, top_k=20, top_p=0.9)])
def test_steps_do_not_wait_for_the_device(sampling: Sampling) -> None:
    model, batch = patch(make_model(device="cuda")), make_batch("left-padded", "cuda")
    step = DecodeGraph(model, make_static_cache(model, 3, 96))
    begin(step, model, batch)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(8):
            step.run()
            step.tokens.copy_(sampling.choose(step.logits)[:, None])
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _allocated() -> int:
    gc.collect()
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


def test_memory_does_not_grow_over_steps() -> None:
    model, batch = patch(make_model(device="cuda")), make_batch("left-padded", "cuda")
    generate_tokens(model, **batch, max_new_tokens=2000)
    before = _allocated()
    assert generate_tokens(model, **batch, max_new_tokens=2000).shape == (3, 2000)
    assert _allocated() == before


def test_memory_does_not_grow_over_calls() -> None:
    model = patch(make_model(device="cuda"))
    batches = [make_batch(kind, "cuda") for kind in ("single", "left-padded")]

    def call(count: int) -> None:
        for index in range(count):
            batch = batches[index % 2]
            model.generate(**batch, max_new_tokens=4, do_sample=index % 3 == 0)
            generate_tokens(model, **batch, max_new_tokens=4)

    call(4)
    before = _allocated()
    call(50)
    assert _allocated() == before


def test_freed_caches_give_their_memory_back() -> None:
    model, batch = patch(make_model(device="cuda")), make_batch("left-padded", "cuda")
    generate_tokens(model, **batch, max_new_tokens=4)
    free_kept_caches(model)
    before = _allocated()
    generate_tokens(model, **batch, max_new_tokens=1000)
    slots = sum(2 * layer.keys.nbytes for layer in _kept_cache(model).layers)
    assert _allocated() >= before + slots
    free_kept_caches(model)
    assert _allocated() == before


def _kept_cache(model: Any) -> Any:
    steps = kept_steps(model)
    with steps.turn():
        return steps.get(model, 3, 1024).cache
