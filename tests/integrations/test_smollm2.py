"""A real LLaMA end to end, in float32: SmolLM2-135M-Instruct writes what it writes on Hugging Face's sdpa."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import Cache, DynamicCache, StaticCache

from flashcore_ops.integrations.transformers import replace_llama_attention_with_flashcore, restore_attention
from tests.conftest import DEVICES

PROMPTS = (
    "Once upon a time",
    "The meaning of life is",
    "In a galaxy far, far away",
    "def fibonacci(n):\n    ",
)
NUM_TOKENS = 200
NUM_BATCH_TOKENS = 50


class Loaded(NamedTuple):
    model: Any
    tokenizer: Any

    def write(self, prompts: list[str], num_tokens: int) -> list[list[int]]:
        inputs = self.tokenizer(prompts, return_tensors="pt", padding=True).to(self.model.device)
        tokens = self.model.generate(**inputs, do_sample=False, min_new_tokens=num_tokens, max_new_tokens=num_tokens)
        return tokens[:, inputs["input_ids"].shape[1] :].tolist()


class Runs(NamedTuple):
    """The same prompts on sdpa and on ours."""

    sdpa: list[list[int]]
    ours: list[list[int]]


@pytest.fixture(scope="module", params=DEVICES)
def loaded(request: pytest.FixtureRequest, real_model: Path) -> Loaded:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(real_model, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(real_model, dtype=torch.float32).to(request.param)
    return Loaded(model, tokenizer)


@contextmanager
def patched(model: Any) -> Iterator[None]:
    replace_llama_attention_with_flashcore(model)
    try:
        yield
    finally:
        restore_attention(model)


def _run_both(loaded: Loaded, prompts: list[str], num_tokens: int) -> Runs:
    sdpa = loaded.write(prompts, num_tokens)
    with patched(loaded.model):
        ours = loaded.write(prompts, num_tokens)
    return Runs(sdpa, ours)


@pytest.fixture(scope="module")
def story(loaded: Loaded) -> Runs:
    return _run_both(loaded, [PROMPTS[0]], NUM_TOKENS)


@pytest.fixture(scope="module")
def batch(loaded: Loaded) -> Runs:
    return _run_both(loaded, list(PROMPTS), NUM_BATCH_TOKENS)


@pytest.mark.parametrize("num_tokens", [1, 50, NUM_TOKENS])
def test_first_tokens_equal_sdpa(story: Runs, num_tokens: int) -> None:
    assert len(story.ours[0]) == NUM_TOKENS
    assert story.ours[0][:num_tokens] == story.sdpa[0][:num_tokens]


def test_the_story_makes_sense(story: Runs, loaded: Loaded) -> None:
    words = loaded.tokenizer.decode(story.ours[0]).split()
    assert len(set(words)) > 30
    assert {"the", "a", "of"} <= set(words)


@pytest.mark.parametrize("row", range(len(PROMPTS)))
def test_left_padded_batch_equals_sdpa(batch: Runs, row: int) -> None:
    assert len(batch.ours[row]) == NUM_BATCH_TOKENS
    assert batch.ours[row] == batch.sdpa[row]


def test_the_batch_has_rows_of_different_lengths(loaded: Loaded) -> None:
    lengths = [len(ids) for ids in loaded.tokenizer(list(PROMPTS))["input_ids"]]
    assert len(set(lengths)) > 1


def _likeliest(model: Any, **inputs: Any) -> torch.Tensor:
    return model(**inputs, use_cache="past_key_values" in inputs).logits.argmax(dim=-1)


def _right_padded(loaded: Loaded) -> dict[str, torch.Tensor]:
    padded = loaded.tokenizer(list(PROMPTS), return_tensors="pt", padding=True, padding_side="right")
    return dict(padded.to(loaded.model.device))


def _packed(right_padded: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same rows one after another, each by its positions."""
    rows = right_padded["attention_mask"].bool()
    positions = torch.cat([torch.arange(length, device=rows.device) for length in rows.sum(dim=1)])
    return {"input_ids": right_padded["input_ids"][rows][None], "position_ids": positions[None]}


@pytest.mark.filterwarnings("ignore:FlashCore")
def test_right_padded_and_packed_prompts_are_scored_as_by_sdpa(loaded: Loaded) -> None:
    """The likeliest token behind every token of the prompts."""
    model, padded = loaded.model, _right_padded(loaded)
    rows = padded["attention_mask"].bool()
    assert not rows.all()
    batches = (padded, _packed(padded))
    expected = [_likeliest(model, **batch) for batch in batches]
    with patched(model):
        actual = [_likeliest(model, **batch) for batch in batches]
    assert actual[0][rows].tolist() == expected[0][rows].tolist()
    assert actual[1].tolist() == expected[1].tolist() == [actual[0][rows].tolist()]


@contextmanager
def compiled(model: Any) -> Iterator[Any]:
    """The patched model in whole graphs; tests/gpu goes through Inductor too."""
    torch._dynamo.reset()
    with patched(model):
        yield torch.compile(model, fullgraph=True, backend="eager")


def _make_cache(kind: str, model: Any, max_cache_len: int) -> Cache:
    return DynamicCache() if kind == "dynamic" else StaticCache(config=model.config, max_cache_len=max_cache_len)


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_compiled_prompts_of_every_kind_are_scored_as_by_sdpa(loaded: Loaded, cache: str) -> None:
    """Single, left-padded, right-padded and packed."""
    right = _right_padded(loaded)
    packed = _packed(right)
    left = dict(loaded.tokenizer(list(PROMPTS), return_tensors="pt", padding=True).to(loaded.model.device))
    lengths = right["attention_mask"].sum(dim=1)
    single = {name: tensor[:1, : lengths[0]] for name, tensor in right.items()}
    batches = (single, left, right, packed)
    expected = [_likeliest(loaded.model, **batch) for batch in batches]
    # Sequences that lie one after another are told to a compiled model by their bounds.
    packed["cu_seq_lens_q"] = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    with compiled(loaded.model) as model:
        for batch, sdpas in zip(batches, expected, strict=True):
            past = _make_cache(cache, loaded.model, batch["input_ids"].shape[1])
            seen = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
            assert _likeliest(model, **batch, past_key_values=past)[seen].tolist() == sdpas[seen].tolist()


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS], ids=["single", "left-padded"])
def test_compiled_steps_write_sdpas_tokens(loaded: Loaded, prompts: tuple[str, ...], cache: str) -> None:
    num_tokens, tokens = 8, []
    expected = loaded.write(list(prompts), num_tokens)
    ids, mask = loaded.tokenizer(list(prompts), return_tensors="pt", padding=True).to(loaded.model.device).values()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    past = _make_cache(cache, loaded.model, ids.shape[1] + num_tokens)
    with compiled(loaded.model) as model:
        for _ in range(num_tokens):
            logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=past).logits
            ids, positions = logits[:, -1:].argmax(-1), positions[:, -1:] + 1
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            tokens.append(ids)
    assert torch.cat(tokens, dim=1).tolist() == expected


def test_a_static_cache_equals_sdpa(loaded: Loaded) -> None:
    inputs = loaded.tokenizer(list(PROMPTS[:2]), return_tensors="pt", padding=True).to(loaded.model.device)
    options = {"do_sample": False, "max_new_tokens": 8, "cache_implementation": "static", "disable_compile": True}
    expected = loaded.model.generate(**inputs, **options).tolist()
    with patched(loaded.model):
        actual = loaded.model.generate(**inputs, **options).tolist()
    assert actual == expected
