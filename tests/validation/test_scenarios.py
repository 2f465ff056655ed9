"""The five scenarios: passed by a right model, and failed, each for its own reason, by a wrong one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flashcore_ops import decode_step, is_patched
from flashcore_ops.errors import OptionError
from flashcore_ops.validation import scenarios, tokens
from flashcore_ops.validation.scenarios import SCENARIOS, Result, run_scenario
from flashcore_ops.validation.subject import left_padded
from flashcore_ops.validation.tokens import Comparison, compare
from tests.validation.subjects import break_patched_models, make_subject


@pytest.fixture(autouse=True)
def _shorter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scenarios, "SHORT", 12)
    monkeypatch.setattr(scenarios, "LONG", 20)


@pytest.mark.parametrize(("family", "dtype"), [("llama", torch.float32), ("qwen2-window", torch.bfloat16)], ids=str)
def test_a_right_model_passes_all(family: str, dtype: torch.dtype, device: str) -> None:
    subject = make_subject(dtype, device, family)
    results = [run_scenario(scenario, subject) for scenario in SCENARIOS]
    assert [result.passed for result in results] == [True] * 5, results
    assert not is_patched(subject.model)
    if dtype == torch.float32:
        assert all("all equal" in result.evidence for result in (results[1], results[2], results[4]))
    if device == "cuda":
        assert all(result.figures["peak_bytes"] for result in results)


def _zero_a_layer(model: Any) -> None:
    model.model.layers[0].self_attn.o_proj.weight.data.zero_()


def _poison(model: Any) -> None:
    model.lm_head.weight.data[7] = torch.nan


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("breaks", [_zero_a_layer, _poison])
def test_a_wrong_model_fails_wherever_tokens_are_compared(
    breaks: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_patched_models(monkeypatch, breaks)
    subject = make_subject(dtype)
    results = {scenario.__name__: run_scenario(scenario, subject).passed for scenario in SCENARIOS}
    assert results == {
        "next_token": False,
        "short_text": False,
        "long_text": False,
        "cache_memory": True,
        "batch": False,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_steps_that_choose_another_token_fail(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    def third(logits: torch.Tensor, tokens: torch.Tensor | None = None) -> torch.Tensor:
        chosen = logits.topk(3).indices[:, 2:]
        return chosen if tokens is None else tokens.copy_(chosen)

    monkeypatch.setattr(decode_step, "greedy", third)
    subject = make_subject(dtype)
    results = [run_scenario(scenario, subject).passed for scenario in SCENARIOS[1:3]]
    assert results == [False, False]


def test_a_free_text_that_parts_from_its_own_logits_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stream is not what the steps chose: nothing that is fed with sdpa's tokens would notice."""
    stream = tokens.stream_tokens
    monkeypatch.setattr(
        tokens, "stream_tokens", lambda *args, **options: ((t + 1) % 96 for t in stream(*args, **options))
    )
    assert not run_scenario(scenarios.short_text, make_subject(torch.bfloat16)).passed


def test_a_cache_that_moves_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    places = iter(range(100))
    written = scenarios._written_and_memory

    def elsewhere(model: Any, inputs: Any) -> tuple[Any, list[int], int]:
        tokens, _, memory = written(model, inputs)
        return tokens, [next(places)], memory

    monkeypatch.setattr(scenarios, "_written_and_memory", elsewhere)
    result = run_scenario(scenarios.long_text, make_subject())
    assert not result.passed
    assert "moved" in result.evidence


def test_a_cache_larger_than_the_arithmetic_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    make = scenarios.make_static_cache
    monkeypatch.setattr(
        scenarios, "make_static_cache", lambda model, batch, length=1, **sizes: make(model, 2 * batch, 64)
    )
    assert not run_scenario(scenarios.cache_memory, make_subject()).passed


@pytest.mark.parametrize("error", [RuntimeError("out of memory\nand more"), OptionError("an option"), KeyError("a")])
def test_a_scenario_that_raises_has_failed(error: Exception) -> None:
    def next_token(_: Any) -> Result:
        raise error

    result = run_scenario(next_token, make_subject())
    assert (result.name, result.passed) == ("next token", False)
    assert result.evidence == f"{type(error).__name__}: {str(error).splitlines()[0]}"


def test_evidence_names_the_first_difference_and_the_gap_there(monkeypatch: pytest.MonkeyPatch) -> None:
    break_patched_models(monkeypatch, _zero_a_layer)
    subject = make_subject()
    with torch.no_grad():
        comparison = compare(subject, left_padded(subject.prompts()[:1]), num_tokens=8)
    assert comparison.first is not None
    row, index, token, reference_token, gap = comparison.first
    assert row == 0
    assert comparison.tokens[0][index] == token != reference_token
    assert gap > 0
    assert f"first difference at index {index}: {token}, sdpa {reference_token}, gap {gap:.3g}" in comparison.evidence()


def test_evidence_names_the_attention_that_it_is_held_against() -> None:
    evidence = a_comparison(reference="eager", first=(0, 1, 2, 3, 0.5), noise=0.1).evidence()
    assert evidence.count("eager") == 3
    assert "sdpa" not in evidence
    subject = make_subject(family="gemma2")
    with torch.no_grad():
        assert compare(subject, left_padded(subject.prompts()[:1]), num_tokens=2).reference == "eager"


def a_comparison(**changes: Any) -> Comparison:
    fields: dict[str, Any] = {
        "reference": "sdpa",
        "num_tokens": 5,
        "num_others": 1,
        "first": (0, 3, 7, 8, 0.1),
        "largest_gap": 0.1,
        "error": 0.3,
        "noise": 0.2,
        "chooses_its_best": True,
        "tokens": [[1, 2, 3, 7, 4]],
        "ms_per_token": None,
    }
    return Comparison(**fields | changes)


@pytest.mark.parametrize(
    ("changes", "agrees"),
    [
        ({}, True),
        ({"largest_gap": 0.41}, False),
        ({"error": 0.41}, False),
        ({"error": torch.inf}, False),
        ({"error": torch.inf, "noise": torch.inf}, False),
        ({"chooses_its_best": False}, False),
        # No noise is granted in float32.
        ({"noise": None}, False),
        ({"noise": None, "first": None, "num_others": 0}, True),
        ({"noise": None, "first": None, "error": torch.inf}, False),
    ],
)
def test_near_ties_alone_are_granted(changes: dict[str, Any], agrees: bool) -> None:
    assert a_comparison(**changes).agrees == agrees
