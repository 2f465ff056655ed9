"""`generate` of a patched model with kept caches: the tokens of an unpatched one, whatever it is asked for."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList, StaticCache, set_seed

from flashcore_ops import make_static_cache
from flashcore_ops.generation import stream_tokens
from flashcore_ops.integrations import generate as generate_module
from flashcore_ops.integrations.transformers import replace_llama_attention_with_flashcore as patch
from flashcore_ops.kept_steps import free_kept_caches, kept_steps, warmup
from tests.integrations.kept import Ledger, keep_on_cpu
from tests.integrations.models import BATCHES, FAMILIES, ROUTED_FAMILIES, make_batch, make_model


@pytest.fixture(autouse=True)
def ledger(monkeypatch: pytest.MonkeyPatch) -> Ledger:
    return keep_on_cpu(monkeypatch)


def tokens_of(model: Any, batch: Any, **options: Any) -> list[list[int]]:
    set_seed(3)
    defaults = {"max_new_tokens": 12, "do_sample": False}
    output = model.generate(**batch, **(defaults | options))
    sequences = output if isinstance(output, torch.Tensor) else output.sequences
    return sequences[:, batch["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_equal_hugging_faces_and_come_from_one_kept_step(family: str, kind: str, ledger: Ledger) -> None:
    """Prompts of several lengths, the longest first, so that later ones run over slots of earlier ones."""
    model, batch = make_model(family), make_batch(kind)
    prompts = [{name: tensor[:, -length:] for name, tensor in batch.items()} for length in (13, 9, 5)]
    expected = [tokens_of(model, prompt) for prompt in prompts]
    patch(model)
    assert [tokens_of(model, prompt) for prompt in prompts] == expected
    assert ledger.shapes == [(len(batch["input_ids"]), 256)]
    # Of 12 tokens the first is the prefill's.
    assert ledger.num_runs == 3 * 11


@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.parametrize("family", ROUTED_FAMILIES)
def test_experts_that_run_one_by_one_keep_nothing(family: str, kind: str, ledger: Ledger) -> None:
    model, batch = make_model(family), make_batch(kind)
    model.set_experts_implementation("eager")
    expected = tokens_of(model, batch)
    assert tokens_of(patch(model), batch) == expected
    assert ledger.shapes == []


@pytest.mark.parametrize(
    ("options", "num_rows"),
    [
        ({"do_sample": True, "temperature": 0.8, "top_k": 20}, 3),
        ({"do_sample": True, "top_p": 0.7, "repetition_penalty": 1.2}, 3),
        ({"do_sample": True, "num_return_sequences": 2}, 6),
        ({"min_new_tokens": 4, "eos_token_id": [5, 9, 17, 33], "pad_token_id": 0}, 3),
    ],
)
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "cohere2"])
def test_other_ways_that_are_kept(family: str, options: dict[str, Any], num_rows: int, ledger: Ledger) -> None:
    model, batch = make_model(family), make_batch("left-padded")
    expected = tokens_of(model, batch, **options)
    assert tokens_of(patch(model), batch, **options) == expected
    assert kept_steps(model).shapes() == [(num_rows, 256)]
    assert ledger.num_runs == len(expected[0]) - 1


def _own_cache(kind: Any) -> Callable[[Any], dict[str, Any]]:
    return lambda model: {"past_key_values": kind(model)}


HUGGING_FACES: dict[str, Callable[[Any], dict[str, Any]]] = {
    "beams": lambda model: {"num_beams": 3},
    "assisted": lambda model: {"assistant_model": make_model()},
    "prompt lookup": lambda model: {"prompt_lookup_num_tokens": 3},
    "static": lambda model: {"cache_implementation": "static"},
    "dynamic": lambda model: {"cache_implementation": "dynamic"},
    "no cache": lambda model: {"use_cache": False},
    "chunked prefill": lambda model: {"prefill_chunk_size": 5},
    "no compilation": lambda model: {"disable_compile": True},
    "hidden states": lambda model: {"output_hidden_states": True, "return_dict_in_generate": True},
    "own static cache": _own_cache(lambda model: StaticCache(config=model.config, max_cache_len=40)),
    "own dynamic cache": _own_cache(lambda model: DynamicCache(config=model.config)),
    "own cache of ours": _own_cache(lambda model: make_static_cache(model, 1, 40)),
}


@pytest.mark.parametrize("way", HUGGING_FACES)
def test_everything_else_stays_hugging_faces(way: str, ledger: Ledger) -> None:
    model, batch = make_model(), make_batch()
    expected = tokens_of(model, batch)
    patch(model)
    assert tokens_of(model, batch, **HUGGING_FACES[way](model)) == expected
    assert ledger.shapes == []
    assert kept_steps(model).shapes() == []


def test_configs_are_not_written_to() -> None:
    model, batch = patch(make_model()), make_batch()
    before = model.config.to_dict(), model.generation_config.to_dict()
    tokens_of(model, batch)
    assert (model.config.to_dict(), model.generation_config.to_dict()) == before


def test_scores_and_logits_are_copies(ledger: Ledger) -> None:
    """The step's logits stand in one place and are overwritten by the next."""
    options: dict[str, Any] = {"output_logits": True, "output_scores": True, "return_dict_in_generate": True}
    options |= {"max_new_tokens": 6, "do_sample": False}
    model, batch = make_model(), make_batch("left-padded")
    expected = model.generate(**batch, **options)
    actual = patch(model).generate(**batch, **options)
    assert ledger.num_runs == 5
    torch.testing.assert_close(torch.stack(actual.logits), torch.stack(expected.logits))
    torch.testing.assert_close(torch.stack(actual.scores), torch.stack(expected.scores))


def test_a_cache_that_was_handed_out_is_never_used_again(ledger: Ledger) -> None:
    model, batch = patch(make_model()), make_batch("left-padded")
    output = model.generate(**batch, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    cache = output.past_key_values
    assert int(cache.get_seq_length()) == 13 + 3
    assert kept_steps(model).shapes() == []
    before = [layer.keys.clone() for layer in cache.layers]
    expected = tokens_of(model, batch)
    assert len(ledger.shapes) == 2
    assert all(torch.equal(layer.keys, keys) for layer, keys in zip(cache.layers, before, strict=True))
    # The user goes on with it.
    mask = torch.nn.functional.pad(batch["attention_mask"], (0, 4), value=1)
    more = model.generate(
        output.sequences, attention_mask=mask, past_key_values=cache, max_new_tokens=8, do_sample=False
    )
    assert more[:, 13:].tolist() == expected


def test_embeddings_in_the_place_of_tokens(ledger: Ledger) -> None:
    model, batch = make_model(), make_batch()
    expected = tokens_of(model, batch)
    patch(model)
    embeddings = model.get_input_embeddings()(batch["input_ids"])
    mask = batch["attention_mask"]
    output = model.generate(inputs_embeds=embeddings, attention_mask=mask, max_new_tokens=12, do_sample=False)
    assert output.tolist() == expected
    assert ledger.num_runs == 11


@pytest.mark.filterwarnings("ignore:FlashCore")
def test_masks_with_holes_take_the_dense_path(ledger: Ledger) -> None:
    model, batch = make_model(), make_batch("right-padded")
    expected = tokens_of(model, batch)
    assert tokens_of(patch(model), batch) == expected
    assert ledger.num_runs == 0


def test_positions_given_by_hand_are_obeyed(ledger: Ledger) -> None:
    model, batch = make_model(), make_batch("left-padded")
    positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0) * 2
    expected = tokens_of(model, batch, position_ids=positions)
    assert expected != tokens_of(model, batch)
    assert tokens_of(patch(model), batch, position_ids=positions) == expected
    assert ledger.num_runs == 11


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_another_implementation_set_later_keeps_nothing(implementation: str, ledger: Ledger) -> None:
    model, batch = make_model(), make_batch("left-padded")
    expected = tokens_of(model, batch)
    patch(model).set_attn_implementation(implementation)
    assert tokens_of(model, batch) == expected
    assert ledger.shapes == []


def test_hooks_keep_nothing(ledger: Ledger) -> None:
    model, batch = make_model(), make_batch("left-padded")
    model.model.layers[0].mlp.register_forward_hook(lambda module, args, output: 1.5 * output)
    expected = tokens_of(model, batch)
    assert tokens_of(patch(model), batch) == expected
    assert ledger.shapes == []


def test_autocast_keeps_nothing(ledger: Ledger) -> None:
    """A cache in the model's dtype could not take what autocast gives."""
    model, batch = patch(make_model()), make_batch("left-padded")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tokens_of(model, batch)
    assert ledger.shapes == []


class Nested(LogitsProcessor):
    """Generates with the same model in the midst of a generation, and changes nothing."""

    def __init__(self, model: Any, batch: Any) -> None:
        self.model, self.batch = model, batch
        self.results: list[list[list[int]]] = []

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        if len(self.results) < 3:
            self.results.append([])
            self.results[-1] = self.model.generate(**self.batch, max_new_tokens=5, do_sample=False)[:, 13:].tolist()
        return scores


def test_a_generation_inside_another_does_not_disturb_it(ledger: Ledger) -> None:
    model, batch = make_model(), make_batch("left-padded")
    expected = tokens_of(model, batch)
    patch(model)
    nested = Nested(model, batch)
    assert tokens_of(model, batch, logits_processor=LogitsProcessorList([nested])) == expected
    assert nested.results == [[row[:5] for row in expected]] * 3
    assert ledger.shapes == [(3, 256)]


def test_a_generation_inside_a_stream_does_not_disturb_it() -> None:
    model, batch = make_model(), make_batch("left-padded")
    expected = tokens_of(model, batch)
    patch(model)
    inputs = batch["input_ids"], batch["attention_mask"]
    streamed = []
    for first, second in zip(*(stream_tokens(model, *inputs, max_new_tokens=12) for _ in range(2)), strict=True):
        assert torch.equal(first, second)
        assert tokens_of(model, batch, max_new_tokens=3) == [row[:3] for row in expected]
        free_kept_caches(model)
        streamed.append(first)
    assert torch.stack(streamed, dim=1).tolist() == expected


def _in_threads(*calls: Callable[[], Any]) -> list[Any]:
    results: list[Any] = [None] * len(calls)

    def run(index: int) -> None:
        with torch.no_grad():
            results[index] = calls[index]()

    threads = [threading.Thread(target=run, args=(index,), daemon=True) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in threads)
    return results


def test_threads_take_turns_with_one_model(ledger: Ledger) -> None:
    model = make_model()
    batches = [{name: tensor[:, -length:] for name, tensor in make_batch().items()} for length in (13, 7)]
    expected = [tokens_of(model, batch, max_new_tokens=24) for batch in batches] * 2
    patch(model)
    calls = [lambda batch=batch: tokens_of(model, batch, max_new_tokens=24) for batch in batches] * 2
    assert _in_threads(*calls) == expected
    assert ledger.shapes == [(1, 256)]


def test_two_models_run_in_two_threads(ledger: Ledger) -> None:
    models, batch = [make_model("llama"), make_model("mistral")], make_batch("left-padded")
    expected = [tokens_of(model, batch, max_new_tokens=24) for model in models]
    for model in models:
        patch(model)
    calls = [lambda model=model: tokens_of(model, batch, max_new_tokens=24) for model in models]
    assert _in_threads(*calls) == expected
    assert ledger.shapes == [(3, 256)] * 2


def test_an_iterator_may_change_threads() -> None:
    """Servers take each token in whichever thread of a pool is free."""
    model, batch = make_model(), make_batch()
    expected = tokens_of(model, batch)
    stream = stream_tokens(patch(model), batch["input_ids"], max_new_tokens=12)
    tokens = [_in_threads(lambda: next(stream, None))[0] for _ in range(13)]
    assert [int(token) for token in tokens[:12]] == expected[0]
    assert tokens[12] is None
    assert tokens_of(model, batch) == expected


def test_without_memory_for_the_cache_generate_goes_on(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = make_model(), make_batch()
    expected = tokens_of(model, batch)
    patch(model)

    def no_memory(*_: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(generate_module, "_warned", set())
    monkeypatch.setattr("flashcore_ops.kept_steps.make_decode_step", no_memory)
    with pytest.warns(UserWarning, match="no memory for a static cache of 1 x 256 slots"):
        assert tokens_of(model, batch) == expected
    assert ledger.num_runs == 0


def test_what_keeps_nothing_waits_for_nobody() -> None:
    """A beam search in one thread while another holds the model's steps."""
    model, batch = patch(make_model()), make_batch()
    done = threading.Event()

    def search() -> None:
        tokens_of(model, batch, num_beams=2)
        done.set()

    with kept_steps(model).turn():
        thread = threading.Thread(target=search)
        thread.start()
        assert done.wait(60)
    thread.join()


def test_warmup_makes_the_cache_of_exactly_so_many_tokens(ledger: Ledger) -> None:
    model, batch = patch(make_model()), make_batch()
    warmup(model, batch_size=1, capacity=257)
    tokens_of(model, batch, max_new_tokens=257 - batch["input_ids"].shape[1])
    assert ledger.shapes == [(1, 512)]
