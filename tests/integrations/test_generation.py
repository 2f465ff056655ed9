"""Every way of generating gives the tokens of Hugging Face's sdpa."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import set_seed

from flashcore_ops.integrations.transformers import replace_llama_attention_with_flashcore as patch
from tests.integrations.models import CACHES, generate, make_batch, make_model

WAYS: dict[str, dict[str, Any]] = {
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 20},
    "beams": {"num_beams": 3},
    "several sequences": {"do_sample": True, "num_return_sequences": 2},
    "chunked prefill": {"prefill_chunk_size": 5},
    "no cache": {"use_cache": False},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
}


def _tokens(model: Any, batch: Any, **options: Any) -> list[list[int]]:
    set_seed(3)
    return generate(model, batch, **options).tolist()


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("way", WAYS)
def test_each_way_gives_the_tokens_of_sdpa(way: str, family: str, device: str) -> None:
    kind = "single" if way == "prompt lookup" else "left-padded"
    model, batch = make_model(family, device), make_batch(kind, device)
    expected = _tokens(model, batch, **WAYS[way])
    assert _tokens(patch(model), batch, **WAYS[way]) == expected


@pytest.mark.parametrize("way", ["sampling", "beams", "chunked prefill"])
def test_static_cache_serves_each_way(way: str, device: str) -> None:
    model, batch = make_model(device=device), make_batch("left-padded", device)
    options = WAYS[way] | {"cache_implementation": "static"}
    expected = _tokens(model, batch, **options)
    assert _tokens(patch(model), batch, **options) == expected


@pytest.mark.parametrize("cache", CACHES)
def test_models_that_take_turns_do_not_disturb_each_other(cache: str) -> None:
    llama, mistral = patch(make_model("llama")), patch(make_model("mistral"))
    batch = make_batch("left-padded")
    alone = [_tokens(model, batch, cache_implementation=cache) for model in (llama, mistral)]
    again = [_tokens(model, batch, cache_implementation=cache) for model in (llama, mistral)]
    assert again == alone


def test_assisted_generation(device: str) -> None:
    model, assistant = make_model(device=device), make_model(device=device)
    batch = make_batch(device=device)
    expected = generate(model, batch)
    assert generate(patch(model), batch, assistant_model=patch(assistant)).tolist() == expected.tolist()
