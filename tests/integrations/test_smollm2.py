"""A real LLaMA end to end, in float32: SmolLM2-135M-Instruct writes what it writes on Hugging Face's sdpa."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from flashcore_ops.integrations.transformers import replace_llama_attention_with_flashcore as patch
from flashcore_ops.integrations.transformers import restore_attention
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


def _run_both(loaded: Loaded, prompts: list[str], num_tokens: int) -> Runs:
    sdpa = loaded.write(prompts, num_tokens)
    patch(loaded.model)
    ours = loaded.write(prompts, num_tokens)
    restore_attention(loaded.model)
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
    return model(**inputs, use_cache=False).logits.argmax(dim=-1)


@pytest.mark.filterwarnings("ignore:FlashCore")
def test_right_padded_and_packed_prompts_are_scored_as_by_sdpa(loaded: Loaded) -> None:
    """The likeliest token behind every token of the prompts."""
    model, tokenizer = loaded
    padded = tokenizer(list(PROMPTS), return_tensors="pt", padding=True, padding_side="right").to(model.device)
    rows = padded["attention_mask"].bool()
    assert not rows.all()
    lengths = rows.sum(dim=1)
    positions = torch.cat([torch.arange(length, device=model.device) for length in lengths])
    batches = ({**padded}, {"input_ids": padded["input_ids"][rows][None], "position_ids": positions[None]})
    expected = [_likeliest(model, **batch) for batch in batches]
    patch(model)
    actual = [_likeliest(model, **batch) for batch in batches]
    restore_attention(model)
    assert actual[0][rows].tolist() == expected[0][rows].tolist()
    assert actual[1].tolist() == expected[1].tolist() == [actual[0][rows].tolist()]


def test_a_static_cache_equals_sdpa(loaded: Loaded) -> None:
    inputs = loaded.tokenizer(list(PROMPTS[:2]), return_tensors="pt", padding=True).to(loaded.model.device)
    options = {"do_sample": False, "max_new_tokens": 8, "cache_implementation": "static", "disable_compile": True}
    expected = loaded.model.generate(**inputs, **options).tolist()
    patch(loaded.model)
    actual = loaded.model.generate(**inputs, **options).tolist()
    restore_attention(loaded.model)
    assert actual == expected
