"""The five scenarios: what a model on FlashCore must show beside the same model on Hugging Face's attention."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from flashcore_ops import make_static_cache
from flashcore_ops.errors import first_line
from flashcore_ops.generation import generate_tokens
from flashcore_ops.kept_steps import capacity_for, kept_steps
from flashcore_ops.kv_memory import KVShape, format_bytes
from flashcore_ops.validation.subject import Subject, left_padded
from flashcore_ops.validation.tokens import Comparison, compare, patched

SHORT, LONG = 50, 200
# Tokens of the measured caches.
CACHE_LENGTH, CACHE_BATCH = 2048, 1
# The bar for what an allocator may add to the arithmetic.
MEMORY_TOLERANCE = 0.02


@dataclass(frozen=True)
class Result:
    """What a scenario found.

    Attributes:
        evidence: one line.
        text: what the model wrote, if it has a tokenizer.
        figures: numbers by name, for the report.
    """

    name: str
    passed: bool
    evidence: str
    text: str | None = None
    figures: Mapping[str, float | None] = field(default_factory=dict)
    seconds: float = 0.0


def next_token(subject: Subject) -> Result:
    """The likeliest next token of each prompt."""
    comparisons = [compare(subject, left_padded([prompt]), num_tokens=1) for prompt in subject.prompts()]
    worst = max(comparisons, key=lambda comparison: comparison.error)
    passed = all(comparison.agrees for comparison in comparisons)
    num_equal = sum(comparison.first is None for comparison in comparisons)
    evidence = f"{num_equal} of {len(comparisons)} equal; logits off by at most {worst.error:.3g}"
    for comparison in comparisons:
        if comparison.first is not None:
            evidence += f"; {comparison.evidence()}"
    return Result("next token", passed, evidence, figures=_figures(worst))


def short_text(subject: Subject) -> Result:
    """A text of some length, to be read."""
    return _text(subject, f"{SHORT} tokens", SHORT)


def long_text(subject: Subject) -> Result:
    """A longer text, written twice: the same tokens, from a cache that neither moves nor grows."""
    result = _text(subject, f"{LONG} tokens, cache stable", LONG)
    inputs = left_padded(subject.prompts()[:1])
    with patched(subject) as model:
        before = _written_and_memory(model, inputs)
        after = _written_and_memory(model, inputs)
    is_stable = before == after
    evidence = f"{result.evidence}; the cache {'stayed in place' if is_stable else 'moved, grew or told another text'}"
    return replace(result, passed=result.passed and is_stable, evidence=evidence)


def cache_memory(subject: Subject) -> Result:
    """The bytes of the cache with the model's own KV heads, and with as many as it has query heads."""
    shape = KVShape.of(subject.model.config)
    with patched(subject) as model:
        gqa = _measure(subject.device, lambda: make_static_cache(model, CACHE_BATCH, CACHE_LENGTH))
    mha = _measure(subject.device, lambda: _allocate(subject, shape.as_mha()))
    evidence, passed = [f"{CACHE_LENGTH} tokens"], True
    for name, heads, measured in (("GQA", shape, gqa), ("MHA", shape.as_mha(), mha)):
        computed = heads.cache_bytes(CACHE_BATCH, CACHE_LENGTH, subject.dtype)
        passed = passed and abs(measured / computed - 1) <= MEMORY_TOLERANCE
        evidence.append(
            f"{name}, {heads.num_kv_heads} heads: {format_bytes(computed)} computed, {format_bytes(measured)} measured"
        )
    figures = {"gqa_bytes": float(gqa), "mha_bytes": float(mha)}
    return Result("KV-cache memory, GQA and MHA", passed, "; ".join(evidence), figures=figures)


def batch(subject: Subject) -> Result:
    """Four prompts of different lengths at once, padded on the left."""
    comparison = compare(subject, left_padded(subject.prompts()), SHORT)
    name = f"batch of {len(subject.prompts())} prompts"
    return Result(name, comparison.agrees, comparison.evidence(), figures=_figures(comparison))


SCENARIOS: tuple[Callable[[Subject], Result], ...] = (next_token, short_text, long_text, cache_memory, batch)


def run_scenario(scenario: Callable[[Subject], Result], subject: Subject) -> Result:
    """A scenario's result with its time; one that raises, whatever it is, has failed."""
    start = time.perf_counter()
    try:
        with torch.no_grad():
            result = scenario(subject)
    except Exception as error:
        result = failed(scenario.__name__.replace("_", " "), error)
    figures = dict(result.figures)
    if subject.device.type == "cuda":
        figures["peak_bytes"] = float(torch.cuda.max_memory_allocated(subject.device))
    return replace(result, figures=figures, seconds=time.perf_counter() - start)


def failed(name: str, error: Exception) -> Result:
    """What an error amounts to.

    Example:
        >>> failed("next token", ValueError("a shape\\nand more")).evidence
        'ValueError: a shape'
    """
    return Result(name, passed=False, evidence=f"{type(error).__name__}: {first_line(error)}")


def _text(subject: Subject, name: str, num_tokens: int) -> Result:
    prompt = subject.prompts()[0]
    comparison = compare(subject, left_padded([prompt]), num_tokens)
    text = subject.text([*prompt.tolist(), *comparison.tokens[0]])
    return Result(name, comparison.agrees, comparison.evidence(), text=text, figures=_figures(comparison))


def _figures(comparison: Comparison) -> dict[str, float | None]:
    return {
        "tokens": comparison.num_tokens,
        "preferred_otherwise": comparison.num_others,
        "first_difference": None if comparison.first is None else comparison.first[1],
        "gap_at_first_difference": None if comparison.first is None else comparison.first[4],
        "noise": comparison.noise,
        "logit_error": comparison.error,
        "ms_per_token": comparison.ms_per_token,
    }


def _written_and_memory(model: Any, inputs: dict[str, Tensor]) -> tuple[list[list[int]], list[int], int]:
    """A long text, where its cache lies, and the GPU memory that is in use afterwards."""
    tokens = generate_tokens(model, **inputs, max_new_tokens=LONG).tolist()
    steps = kept_steps(model)
    with steps.turn():
        cache = steps.get(model, 1, capacity_for(inputs["input_ids"].shape[1] + LONG)).cache
    addresses = [address for layer in cache.layers for address in (layer.keys.data_ptr(), layer.values.data_ptr())]
    is_cuda = inputs["input_ids"].is_cuda
    gc.collect()
    return tokens, addresses, torch.cuda.memory_allocated(inputs["input_ids"].device) if is_cuda else 0


def _allocate(subject: Subject, shape: KVShape) -> list[Tensor]:
    size = (CACHE_BATCH, shape.num_kv_heads, CACHE_LENGTH, shape.head_dim)
    return [torch.zeros(size, dtype=subject.dtype, device=subject.device) for _ in range(2 * shape.num_layers)]


def _measure(device: torch.device, make: Callable[[], Any]) -> int:
    """Bytes that what `make` returns takes: by the GPU's allocator, or by its tensors' sizes."""
    if device.type == "cuda":
        gc.collect()
        before = torch.cuda.memory_allocated(device)
        made = make()
        return torch.cuda.memory_allocated(device) - before
    made = make()
    tensors = made if isinstance(made, list) else [t for layer in made.layers for t in (layer.keys, layer.values)]
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)
