"""Every way of generating gives the tokens of Hugging Face's attention, in every family.

DoLa and beams in groups are not among them: transformers 5.17 has them as code on its hub only. It has contrastive
search there too, which is therefore written out here.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, set_seed

from flashcore_ops.integrations.transformers import replace_llama_attention_with_flashcore as patch
from tests.integrations.models import CACHES, FAMILIES, PROMPT_LEN, WINDOW_FAMILIES, generate, make_batch, make_model

WAYS: dict[str, dict[str, Any]] = {
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 20},
    "several sequences": {"do_sample": True, "num_return_sequences": 2},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampled beams": {"num_beams": 2, "do_sample": True},
    "chunked prefill": {"prefill_chunk_size": 5},
}


def _tokens(model: Any, batch: Any, **options: Any) -> list[list[int]]:
    set_seed(3)
    return generate(model, batch, **options).tolist()


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", FAMILIES)
def test_each_way_gives_hugging_faces_tokens(family: str, way: str, cache: str, device: str) -> None:
    model, batch = make_model(family, device), make_batch("left-padded", device)
    options = WAYS[way] | {"cache_implementation": cache}
    expected = _tokens(model, batch, **options)
    assert _tokens(patch(model), batch, **options) == expected


@pytest.mark.parametrize("way", ["beams", "chunked prefill"])
@pytest.mark.parametrize("family", WINDOW_FAMILIES)
def test_a_window_in_a_cache_that_keeps_every_token(family: str, way: str, device: str) -> None:
    """A DynamicCache that is told no config has no sliding layers."""
    model, batch = make_model(family, device), make_batch("left-padded", device)
    expected = _tokens(model, batch, **WAYS[way], past_key_values=DynamicCache())
    assert _tokens(patch(model), batch, **WAYS[way], past_key_values=DynamicCache()) == expected


@pytest.mark.filterwarnings("ignore:FlashCore")
@pytest.mark.parametrize("way", ["beams", "chunked prefill"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt-oss"])
def test_ways_of_the_dense_path(family: str, way: str, device: str) -> None:
    model, batch = make_model(family, device), make_batch("right-padded", device)
    expected = _tokens(model, batch, **WAYS[way])
    assert _tokens(patch(model), batch, **WAYS[way]) == expected


@pytest.mark.filterwarnings("ignore:.*cache_implementation")
@pytest.mark.parametrize("cache", ["sliding_window", "hybrid"])
@pytest.mark.parametrize("family", ["mistral", "gemma2", "cohere2"])
def test_caches_by_their_former_names(family: str, cache: str) -> None:
    """transformers makes a StaticCache of the layers that the config asks for, whatever the name."""
    model, batch = make_model(family), make_batch("left-padded")
    expected = _tokens(model, batch, cache_implementation=cache)
    assert _tokens(patch(model), batch, cache_implementation=cache) == expected


def _contrastive_tokens(model: Any, batch: dict[str, Tensor], top_k: int = 3, penalty: float = 0.6) -> list[list[int]]:
    """12 tokens by contrastive search (Su et al., arXiv 2202.06417), which repeats a cache's rows and selects some."""
    mask, cache, made = batch["attention_mask"], DynamicCache(config=model.config), []
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    output = model(**batch, position_ids=positions, past_key_values=cache, output_hidden_states=True)
    logits, context = output.logits[:, -1], output.hidden_states[-1]
    rows = torch.arange(len(mask), device=mask.device)
    for _ in range(12):
        likely = logits.softmax(-1).topk(top_k)
        cache.batch_repeat_interleave(top_k)
        wider = torch.nn.functional.pad(mask, (0, 1), value=1)
        output = model(
            input_ids=likely.indices.view(-1, 1),
            attention_mask=wider.repeat_interleave(top_k, 0),
            position_ids=(positions[:, -1:] + 1).repeat_interleave(top_k, 0),
            past_key_values=cache,
            output_hidden_states=True,
        )
        hidden = output.hidden_states[-1].view(len(mask), top_k, -1)
        likeness = torch.cosine_similarity(hidden[:, :, None], context[:, None], dim=-1)
        likeness = likeness.masked_fill(mask[:, None] == 0, -1.0).amax(-1)
        best = ((1 - penalty) * likely.values - penalty * likeness).argmax(-1)
        cache.batch_select_indices(rows * top_k + best)
        made.append(likely.indices[rows, best])
        logits = output.logits.view(len(mask), top_k, -1)[rows, best]
        context, mask = torch.cat([context, hidden[rows, best][:, None]], dim=1), wider
        positions = positions[:, -1:] + 1
    return torch.stack(made, dim=1).tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_contrastive_search(family: str, device: str) -> None:
    model, batch = make_model(family, device), make_batch("left-padded", device)
    greedy = _tokens(model, batch)
    with torch.no_grad():
        expected = _contrastive_tokens(model, batch)
        assert expected != greedy
        assert _contrastive_tokens(patch(model), batch) == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_without_a_cache(family: str, device: str) -> None:
    model, batch = make_model(family, device), make_batch("left-padded", device)
    expected = _tokens(model, batch, use_cache=False)
    assert _tokens(patch(model), batch, use_cache=False) == expected


@pytest.mark.parametrize("cache", CACHES)
def test_models_that_take_turns_do_not_disturb_each_other(cache: str) -> None:
    llama, mistral = patch(make_model("llama")), patch(make_model("mistral"))
    batch = make_batch("left-padded")
    alone = [_tokens(model, batch, cache_implementation=cache) for model in (llama, mistral)]
    again = [_tokens(model, batch, cache_implementation=cache) for model in (llama, mistral)]
    assert again == alone


def _query_lengths(model: Any) -> list[int]:
    """Filled by each call of a model with the number of its tokens."""
    lengths: list[int] = []

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        lengths.append(kwargs["input_ids"].shape[1])

    model.register_forward_pre_hook(note, with_kwargs=True)
    return lengths


@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_lookup(family: str, device: str) -> None:
    """A prompt that repeats itself, so that there is something to look up, and guesses are rejected."""
    model = make_model(family, device)
    batch = {name: tensor[:, :5].repeat(1, 3) for name, tensor in make_batch(device=device).items()}
    expected = _tokens(model, batch, prompt_lookup_num_tokens=3)
    assert expected == _tokens(model, batch)
    lengths = _query_lengths(patch(model))
    assert _tokens(model, batch, prompt_lookup_num_tokens=3) == expected
    assert lengths[0] == 15 + 3


@pytest.mark.parametrize("noise", [0.0, 0.02], ids=["of the same weights", "of other weights"])
@pytest.mark.parametrize("family", FAMILIES)
def test_assisted_generation(family: str, noise: float, device: str) -> None:
    """A twin's drafts are all accepted, so they are right too; another's are cut off, and the caches with them.

    Against greedy search: transformers 5.17 itself raises once a draft model's sliding cache is past its window.
    """
    model, assistant, batch = make_model(family, device), make_model(family, device), make_batch(device=device)
    # The same on every device: other noise might leave every draft right.
    generator = torch.Generator().manual_seed(0)
    for weight in assistant.parameters():
        weight += noise * torch.randn(weight.shape, generator=generator).to(device)
    drafts = {"assistant_confidence_threshold": 0.0, "num_assistant_tokens": 5}
    assistant.generation_config.update(**drafts, num_assistant_tokens_schedule="constant")
    expected = _tokens(model, batch)
    lengths = _query_lengths(patch(model))
    assert _tokens(model, batch, assistant_model=patch(assistant)) == expected
    assert lengths[:2] == [PROMPT_LEN + 5, 6]
    assert (len(lengths) == 2) == (noise == 0)
