"""Our own loop: the tokens of Hugging Face's sdpa, one by one or in one go, and draws that follow the distribution."""

from __future__ import annotations

import gc
import threading
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Phi3ForCausalLM

from flashcore_ops.errors import MaskError, OptionError, ShapeError
from flashcore_ops.generation import STEPS_PER_READ, Sampling, generate_tokens, stream_tokens
from flashcore_ops.integrations.transformers import replace_llama_attention_with_flashcore as patch
from flashcore_ops.kept_steps import kept_steps
from tests.integrations.models import BATCHES, FAMILIES, FUSED_FAMILIES, generate, make_batch, make_model

MORE_THAN_ASKED_FOR = 50


def stream(model: Any, batch: dict[str, Tensor], **options: Any) -> Tensor:
    steps = list(stream_tokens(model, **batch, **({"max_new_tokens": 12} | options)))
    return torch.stack(steps, dim=1)


@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.parametrize(
    ("family", "steps_per_read"),
    [(family, 5) for family in FAMILIES]
    + [(family, steps) for family in FUSED_FAMILIES for steps in (1, STEPS_PER_READ, MORE_THAN_ASKED_FOR)],
)
def test_tokens_equal_hugging_faces(family: str, kind: str, steps_per_read: int, device: str) -> None:
    model, batch = make_model(family, device), make_batch(kind, device)
    expected = generate(model, batch)
    tokens = stream(patch(model), batch, steps_per_read=steps_per_read)
    assert tokens.tolist() == expected.tolist()
    assert (tokens.dtype, tokens.device.type) == (torch.int64, "cpu")


def test_rotations_that_change_behind_the_prompt_are_refused() -> None:
    """Phi-3's longrope at its limit, here of 16 tokens. transformers fills the cache anew behind it."""
    batch, config = make_batch(), make_model("phi3").config
    factors = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "rope_theta": 1e4}
    config.original_max_position_embeddings = 16
    config.rope_parameters = {"rope_type": "longrope", "original_max_position_embeddings": 16, **factors}
    model = Phi3ForCausalLM(config).eval()
    expected = generate(model, batch).tolist()
    patch(model)
    assert generate(model, batch).tolist() == expected
    assert stream(model, batch, max_new_tokens=4).tolist() == [expected[0][:4]]
    with pytest.raises(OptionError, match=r"max_new_tokens: expected at most 4, .* past 16 tokens, got 5\."):
        stream(model, batch, max_new_tokens=5)


def test_without_a_mask_there_is_no_padding(device: str) -> None:
    model, batch = make_model(device=device), make_batch(device=device)
    expected = generate(model, batch)
    assert generate_tokens(patch(model), batch["input_ids"], max_new_tokens=12).tolist() == expected.tolist()


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.int32])
def test_masks_of_any_dtype_mean_the_same(dtype: torch.dtype) -> None:
    model, batch = patch(make_model()), make_batch("left-padded")
    other = batch | {"attention_mask": batch["attention_mask"].to(dtype) * (2 if dtype == torch.int32 else 1)}
    assert torch.equal(stream(model, other), stream(model, batch))


@pytest.mark.parametrize("num_tokens", [1, 2, 15, 16, 17, 33])
def test_as_many_tokens_as_asked_for(num_tokens: int) -> None:
    model, ids = patch(make_model()), make_batch()["input_ids"]
    tokens = generate_tokens(model, ids, max_new_tokens=40)
    assert torch.equal(generate_tokens(model, ids, max_new_tokens=num_tokens), tokens[:, :num_tokens])


def test_a_call_longer_than_a_rung_takes_the_next(device: str) -> None:
    model, batch = make_model(device=device), make_batch("left-padded", device)
    expected = generate(model, batch, max_new_tokens=280)
    assert generate_tokens(patch(model), **batch, max_new_tokens=280).tolist() == expected.tolist()
    assert kept_steps(model).shapes() == [(3, 512)]


@pytest.mark.parametrize("steps_per_read", [1, 4, MORE_THAN_ASKED_FOR])
@pytest.mark.parametrize("places", [(0,), (3, 5, 8), (2, 2, 2), (11, 4, 0)])
def test_rows_end_at_their_first_stop_token_and_repeat_it(places: tuple[int, ...], steps_per_read: int) -> None:
    """Row i is meant to end at its token places[i], or earlier if it has another's stop token before."""
    model, batch = patch(make_model()), make_batch("single" if len(places) == 1 else "left-padded")
    free = stream(model, batch)
    stops = {int(free[row, place]) for row, place in enumerate(places)}
    ends = [next(place for place, token in enumerate(row) if token in stops) for row in free.tolist()]
    tokens = stream(model, batch, stop_tokens=stops, steps_per_read=steps_per_read)
    assert tokens.shape[1] == max(ends) + 1
    for row, end in enumerate(ends):
        expected = free[row].clone()
        expected[end:] = free[row, end]
        assert torch.equal(tokens[row], expected[: max(ends) + 1])


def test_stop_tokens_that_never_come_change_nothing() -> None:
    model, batch = patch(make_model()), make_batch("left-padded")
    free = stream(model, batch)
    unused = sorted(set(range(96)) - set(free.flatten().tolist()))[:3]
    assert torch.equal(stream(model, batch, stop_tokens=[*unused, -1, 10**6]), free)


def test_a_seed_of_ones_own_repeats(device: str) -> None:
    model, batch = patch(make_model(device=device)), make_batch("left-padded", device)
    sampling = Sampling(temperature=1.5)

    def draw(seed: int, **options: Any) -> Tensor:
        generator = torch.Generator(device).manual_seed(seed)
        return stream(model, batch, sampling=sampling, generator=generator, **options)

    assert torch.equal(draw(1), draw(1))
    assert torch.equal(draw(1), draw(1, steps_per_read=16))
    assert not torch.equal(draw(1), draw(2))
    torch.manual_seed(5)
    first = stream(model, batch, sampling=sampling)
    torch.manual_seed(5)
    assert torch.equal(stream(model, batch, sampling=sampling), first)


@pytest.mark.parametrize("sampling", [Sampling(temperature=2.0, top_k=1), Sampling(temperature=2.0, top_p=1e-6)])
def test_sampling_from_the_likeliest_alone_is_greedy(sampling: Sampling) -> None:
    model, batch = patch(make_model()), make_batch("left-padded")
    assert torch.equal(stream(model, batch, sampling=sampling), stream(model, batch))


LOGITS = torch.tensor([2.0, -1.0, 0.5, 1.0, -30.0, 1.5, 0.0])
NUM_DRAWS = 20_000


def _expected(temperature: float, top_k: int, top_p: float) -> Tensor:
    """Probabilities by definition, in float64."""
    probabilities = (LOGITS.double() / temperature).softmax(0)
    order = probabilities.argsort(descending=True)
    count = top_k or len(LOGITS)
    kept = probabilities[order] / probabilities[order[:count]].sum()
    kept[count:] = 0
    nucleus = int((kept.cumsum(0) < top_p).sum()) + 1
    kept[nucleus:] = 0
    return torch.zeros_like(probabilities).scatter(0, order, kept / kept.sum())


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (3, 1.0), (7, 1.0), (100, 1.0), (0, 0.6), (4, 0.8)])
def test_draws_follow_the_distribution(temperature: float, top_k: int, top_p: float, device: str) -> None:
    expected = _expected(temperature, top_k, top_p) * NUM_DRAWS
    sampling = Sampling(temperature, top_k, top_p)
    generator = torch.Generator(device).manual_seed(0)
    draws = sampling.choose(LOGITS.to(device).expand(NUM_DRAWS, -1), generator).cpu()
    counts = torch.bincount(draws, minlength=len(LOGITS)).double()
    assert not counts[expected == 0].any()
    likely = expected > 5
    chi_square = ((counts - expected)[likely] ** 2 / expected[likely]).sum()
    # The 1 - 1e-6 quantile for six degrees of freedom; the seed is fixed.
    assert chi_square < 38.3


def test_every_draw_is_a_token_at_any_temperature() -> None:
    logits = torch.randn(64, 97) * 50
    logits[:, 5] = -torch.inf
    for temperature in (1e-38, 1e-3, 1e30):
        for top_k, top_p in ((0, 1.0), (2, 1.0), (0, 0.5)):
            tokens = Sampling(temperature, top_k, top_p).choose(logits)
            assert ((tokens >= 0) & (tokens < 97) & (tokens != 5)).all()
            if temperature < 1:
                likely = logits.gather(1, tokens[:, None])[:, 0] > logits.amax(-1) - 1
                assert likely.all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature: expected 0 or a positive number, got -0.1"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_k": -1}, "top_k: expected 0 or more, got -1"),
        ({"top_p": 0.0}, "top_p: expected above 0, up to 1, got 0.0"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_p": float("nan")}, "top_p"),
    ],
)
def test_sampling_refuses_what_has_no_meaning(options: dict[str, float], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Sampling(**options)


IDS = make_batch()["input_ids"]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"max_new_tokens": 0}, OptionError, "max_new_tokens: expected 1 or more, got 0"),
        ({"steps_per_read": 0}, OptionError, "steps_per_read: expected 1 or more, got 0"),
        ({"input_ids": IDS[0]}, ShapeError, r"input_ids: expected \[B, T\]"),
        ({"input_ids": IDS[:, :0]}, ShapeError, "input_ids"),
        ({"input_ids": IDS[:0]}, ShapeError, "input_ids"),
        ({"attention_mask": torch.ones(1, 12)}, MaskError, r"input_ids' shape \[1, 13\], got \[1, 12\]"),
        ({"attention_mask": torch.ones(1, 13).index_fill(1, torch.tensor(4), 0)}, MaskError, "padding after tokens"),
        ({"attention_mask": torch.ones(1, 13).index_fill(1, torch.tensor(12), 0)}, MaskError, "padding after tokens"),
        ({"attention_mask": torch.zeros(1, 13)}, MaskError, "padding after tokens"),
    ],
)
def test_arguments_are_refused_when_they_are_passed(arguments: dict[str, Any], error: Any, message: str) -> None:
    """Not when the first token is asked for."""
    model = patch(make_model())
    with pytest.raises(error, match=message):
        stream_tokens(model, **({"input_ids": IDS, "max_new_tokens": 4} | arguments))
    assert kept_steps(model).shapes() == []


@pytest.mark.parametrize("implementation", [None, "sdpa"])
def test_models_that_do_not_run_on_flashcore_are_refused(implementation: str | None) -> None:
    model = make_model()
    if implementation is not None:
        patch(model).set_attn_implementation(implementation)
    with pytest.raises(OptionError, match="expected a patched model"):
        stream_tokens(model, IDS, max_new_tokens=4)


@pytest.mark.parametrize("is_closed", [True, False])
def test_an_iterator_left_alone_frees_the_turn(is_closed: bool) -> None:
    """By close(), or with the last reference to it."""
    model, results = patch(make_model()), []
    tokens = stream_tokens(model, IDS, max_new_tokens=100)
    first = next(tokens)
    other = threading.Thread(target=lambda: results.append(generate_tokens(model, IDS, max_new_tokens=3)), daemon=True)
    other.start()
    other.join(timeout=0.2)
    assert other.is_alive()
    if is_closed:
        tokens.close()
    else:
        del tokens
        gc.collect()
    other.join(timeout=60)
    assert torch.equal(results[0][:, 0], first)


def test_slots_of_an_abandoned_generation_do_not_show() -> None:
    model, batch = make_model(), make_batch("left-padded")
    expected = generate(model, batch)
    patch(model)
    next(stream_tokens(model, **batch, max_new_tokens=100)).add_(1)
    steps = kept_steps(model)
    with steps.turn():
        cache = steps.get(model, 3, 256).cache
    for layer in cache.layers:
        layer.keys.fill_(torch.nan)
        layer.values.fill_(torch.nan)
    assert stream(model, batch).tolist() == expected.tolist()
