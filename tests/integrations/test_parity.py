"""Patched models against Hugging Face's sdpa and eager: the same tokens, and logits within the error bar."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, DynamicCache

from flashcore_ops.integrations.attention import fcore_attention
from flashcore_ops.integrations.families import Feature
from flashcore_ops.integrations.transformers import replace_llama_attention_with_flashcore as patch
from tests.integrations.models import (
    ALL_BATCHES,
    ARGUMENTS,
    BATCHES,
    CACHES,
    FAMILIES,
    REFERENCES,
    WINDOW_FAMILIES,
    error_bar,
    features_of,
    generate,
    make_batch,
    make_model,
    static_cache,
)


@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize(("family", "implementation"), REFERENCES)
def test_greedy_tokens_equal_hugging_faces(
    family: str, implementation: str, cache: str, kind: str, device: str
) -> None:
    """Right-padded batches are in test_dense_path: behind more padding than the window, sdpa and eager differ too."""
    model, batch = make_model(family, device, implementation=implementation), make_batch(kind, device)
    expected = generate(model, batch, cache_implementation=cache)
    actual = generate(patch(model), batch, cache_implementation=cache)
    assert actual.tolist() == expected.tolist()


_LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0, 1.5] * 3, "long_factor": [4.0] * 6}
# What checkpoints of the families have beyond the models of FAMILIES.
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama 3's rotation": ("llama", {"rope_parameters": _LLAMA3 | {"original_max_position_embeddings": 16}}),
    "qwen2 28:4": ("qwen2", {"hidden_size": 448, "num_attention_heads": 28, "num_key_value_heads": 4}),
    "phi3 longrope over part of a head": (
        "phi3",
        {"rope_parameters": _LONGROPE | {"original_max_position_embeddings": 16, "partial_rotary_factor": 0.75}},
    ),
    "gpt-neox one after the other": ("gpt-neox", {"use_parallel_residual": False, "attention_bias": False}),
    "granite's multipliers": ("granite", {"residual_multiplier": 0.22, "logits_scaling": 8.0}),
    "cohere without norms": ("cohere", {"use_qk_norm": False, "attention_bias": True}),
    "qwen3-moe, odd": ("qwen3-moe", {"num_experts": 5, "num_experts_per_tok": 3, "mlp_only_layers": [0]}),
}


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("name", SETTINGS)
def test_settings_of_checkpoints(name: str, cache: str) -> None:
    family, settings = SETTINGS[name]
    model, batch = make_model(family, **settings), make_batch("left-padded")
    expected = generate(model, batch, cache_implementation=cache)
    assert generate(patch(model), batch, cache_implementation=cache).tolist() == expected.tolist()


@pytest.mark.filterwarnings("ignore:FlashCore")
@pytest.mark.parametrize("kind", ALL_BATCHES)
@pytest.mark.parametrize(("family", "implementation"), REFERENCES)
def test_logits_are_as_close_as_hugging_faces(family: str, implementation: str, kind: str, device: str) -> None:
    model, batch = make_model(family, device, implementation=implementation), make_batch(kind, device)
    exact, bar = error_bar(model, model(**batch).logits, **batch)
    errors = (patch(model)(**batch).logits.double() - exact).abs()
    # Rows of padding see nothing, and what stands there has no meaning.
    assert errors[batch["attention_mask"].bool()].max() <= bar


@pytest.mark.filterwarnings("ignore:FlashCore")
@pytest.mark.parametrize("kind", ["left-padded", "right-padded"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_in_16_bits_are_as_close_as_hugging_faces(
    family: str, dtype: torch.dtype, kind: str, device: str
) -> None:
    model, batch = make_model(family, device, dtype), make_batch(kind, device)
    exact, bar = error_bar(model, model(**batch).logits, **batch)
    errors = (patch(model)(**batch).logits.double() - exact).abs()
    assert errors[batch["attention_mask"].bool()].max() <= bar


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("family", FAMILIES)
def test_several_tokens_against_a_filled_cache(family: str, cache: str, device: str) -> None:
    """Chunks of 6, 1, 1, 3 and 2 tokens give the logits of one pass, window passed in between."""
    model, batch = make_model(family, device), make_batch("left-padded", device)
    exact, bar = error_bar(model, model(**batch).logits, **batch)
    patch(model)
    past = static_cache(model) if cache == "static" else DynamicCache(config=model.config)
    logits, first = [], 0
    for num_tokens in (6, 1, 1, 3, 2):
        last = first + num_tokens
        step = model(
            input_ids=batch["input_ids"][:, first:last],
            attention_mask=batch["attention_mask"][:, :last],
            past_key_values=past,
        )
        logits.append(step.logits)
        first = last
    errors = (torch.cat(logits, dim=1).double() - exact).abs()
    assert errors[batch["attention_mask"].bool()].max() <= bar


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("family", WINDOW_FAMILIES)
def test_decoding_passes_the_window(family: str, cache: str, device: str) -> None:
    """A prompt of 5 tokens fills the sliding cache of 8 while it decodes."""
    model = make_model(family, device)
    batch = {name: tensor[:, :5] for name, tensor in make_batch(device=device).items()}
    expected = generate(model, batch, cache_implementation=cache)
    assert generate(patch(model), batch, cache_implementation=cache).tolist() == expected.tolist()


@pytest.mark.parametrize("family", WINDOW_FAMILIES)
def test_window_in_a_cache_that_keeps_every_token(family: str, device: str) -> None:
    model, batch = make_model(family, device), make_batch("left-padded", device)
    expected = generate(model, batch, past_key_values=DynamicCache())
    assert generate(patch(model), batch, past_key_values=DynamicCache()).tolist() == expected.tolist()


@pytest.mark.filterwarnings("ignore:FlashCore")
@pytest.mark.parametrize("kind", ["left-padded", "right-padded"])
def test_the_scale_is_the_layers_own(kind: str, device: str) -> None:
    model, batch = make_model(device=device), make_batch(kind, device)
    usual = model(**batch).logits
    for layer in model.model.layers:
        layer.self_attn.scaling *= 3
    rows = batch["attention_mask"].bool()
    exact, bar = error_bar(model, model(**batch).logits, **batch)
    assert (usual - exact)[rows].abs().max() > 100 * bar
    assert (patch(model)(**batch).logits - exact)[rows].abs().max() <= bar


def _drop_padding(arguments: dict[str, Any]) -> None:
    if arguments["attention_mask"] is not None:
        arguments["attention_mask"] = arguments["attention_mask"] * torch.tensor([0, 1], dtype=torch.int32)


def _drop_length(arguments: dict[str, Any]) -> None:
    arguments["attention_mask"] = None


def _tokens_with(model: Any, batch: dict[str, Tensor], cache: Any, change: Any) -> list[list[int]]:
    """What the patched model writes if the arguments of its attention are changed first."""

    def mutilated(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **rest: Any) -> Any:
        arguments = {"attention_mask": mask} | rest
        change(arguments)
        return fcore_attention(module, query, key, value, **arguments)

    patch(model)
    with pytest.MonkeyPatch.context() as patcher:
        patcher.setitem(AttentionInterface._global_mapping, "fcore", mutilated)
        return generate(model, batch, past_key_values=cache).tolist()


@pytest.mark.parametrize(
    ("family", "feature"),
    [(family, feature) for family in FAMILIES for feature in features_of(family) if feature in ARGUMENTS],
)
def test_tokens_change_when_a_feature_of_the_family_is_dropped(family: str, feature: Feature) -> None:
    """The comparisons with Hugging Face's can fail: without the feature the tokens are others."""
    model, batch = make_model(family), make_batch()
    expected = generate(model, batch, past_key_values=DynamicCache()).tolist()
    told = []

    def drop(arguments: dict[str, Any]) -> None:
        told.append(arguments.get(ARGUMENTS[feature]) is not None)
        arguments[ARGUMENTS[feature]] = None

    assert _tokens_with(model, batch, DynamicCache(), drop) != expected
    assert any(told)


@pytest.mark.parametrize(
    ("drop", "make_cache", "kind"),
    [(_drop_padding, lambda model: DynamicCache(), "left-padded"), (_drop_length, static_cache, "single")],
)
def test_tokens_change_when_padding_or_length_is_dropped(drop: Any, make_cache: Any, kind: str) -> None:
    model, batch = make_model(), make_batch(kind)
    expected = generate(model, batch, past_key_values=make_cache(model)).tolist()
    assert _tokens_with(model, batch, make_cache(model), drop) != expected
