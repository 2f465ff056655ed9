"""Measures one case of bench.llama: every implementation is checked, then those that are right take turns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from statistics import median

import torch
from transformers import Cache

from bench.decoders import Decoder, Implementation
from bench.gauge import Gauge
from bench.harness import describe, take_turns
from bench.llama_cases import LlamaCase, why_too_large
from bench.logits import Target, fill_randomly, logits_of, make_target, relative_error
from bench.models import Models
from bench.results import Results, Row, Skip
from flashcore_ops import make_static_cache
from flashcore_ops.uncollected import uncollected

GIB = 2**30


@dataclass(frozen=True)
class Effort:
    """How much is timed: rounds in which every implementation has a turn; tokens of a turn's unsynchronised loop, and
    its synchronised single steps."""

    rounds: int = 3
    tokens: int = 128
    steps: int = 16


# An eager step takes as long as the host does, whose pace may change by half within seconds: short turns, and many.
EAGER_EFFORT = Effort(rounds=15, tokens=4, steps=4)


@torch.no_grad()
def measure_case(
    case: LlamaCase,
    models: Models,
    implementations: Sequence[Implementation],
    read_tbs: float,
    effort: Effort,
    eager_effort: Effort,
    gauge: Gauge,
) -> Results:
    """Rows and skips of a case; what fails as a whole is skipped for all implementations.

    Args:
        read_tbs: the GPU's measured rate, for the floor.
        eager_effort: for the decode of eager implementations, which take turns among themselves.
    """
    results = Results()
    if case.kind == "decode":
        results.rows.append(Row(case, "floor", "loop_ms", models.sizes.floor_ms(case, read_tbs)))
    reason = why_too_large(models.sizes.cache_bytes(case), gauge.free_bytes())
    try:
        if reason is None:
            efforts = {False: effort, True: eager_effort}
            _measure_fitting(case, models, implementations, efforts=efforts, gauge=gauge, results=results)
    except Exception as error:
        reason = f"failed: {describe(error)}"
    finally:
        # Compiled graphs hold memory, and the next case's shapes must not look like a reason for dynamic ones.
        torch.compiler.reset()
    if reason is not None:
        results.rows = [row for row in results.rows if row.impl == "floor"]
        results.skips = [Skip(case, item.name, reason) for item in implementations]
    return results


def _measure_fitting(
    case: LlamaCase,
    models: Models,
    implementations: Sequence[Implementation],
    efforts: Mapping[bool, Effort],
    gauge: Gauge,
    results: Results,
) -> None:
    cache = make_static_cache(models.patched, batch_size=case.batch, max_cache_len=case.capacity)
    target = make_target(models, cache, case)
    empty_bytes = gauge.allocated_bytes()
    decoders: dict[str, Decoder] = {}
    for implementation in implementations:
        reason = implementation.why_not(case)
        reason = f"cannot run: {reason}" if reason else None
        reason = reason or why_too_large(implementation.extra_bytes(case, models.sizes), gauge.free_bytes())
        if reason is not None:
            results.skips.append(Skip(case, implementation.name, reason))
            continue
        held_bytes = gauge.allocated_bytes() - empty_bytes
        if implementation.has_own_cache:
            held_bytes += models.sizes.cache_bytes(case)
        gauge.restart_peak()
        decoder, error, reason = _build(implementation, models, cache, target)
        if decoder is None:
            results.skips.append(Skip(case, implementation.name, reason))
            continue
        decoders[implementation.name] = decoder
        results.rows.append(Row(case, implementation.name, "logits_rel_err", error))
        results.rows.append(Row(case, implementation.name, "peak_gib", (gauge.peak_bytes() - held_bytes) / GIB))
    if case.kind == "prefill":
        time_turn = partial(time_prefill, target=target, gauge=gauge)
        _time_in_turns(case, decoders, time_turn, rounds=efforts[False].rounds, results=results)
        return
    for is_eager, effort in efforts.items():
        names = [item.name for item in implementations if item.is_eager == is_eager and item.name in decoders]
        time_turn = partial(time_decode, length=case.length, tokens=effort.tokens, steps=effort.steps, gauge=gauge)
        turns = {name: decoders[name] for name in names}
        _time_in_turns(case, turns, time_turn, rounds=effort.rounds, results=results)


def _build(
    implementation: Implementation, models: Models, cache: Cache, target: Target
) -> tuple[Decoder | None, float, str]:
    """A decoder that is right, compiled and warm, and its error; or None and why it is not to be timed."""
    try:
        # Whoever ran before has written into the cache, and a capture may do so as well.
        fill_randomly(cache)
        for layer in cache.layers:
            layer.cumulative_length.fill_(target.past_length)
        decoder = implementation.build(models, cache)
        fill_randomly(cache)
        error = relative_error(logits_of(decoder, target), target.exact)
    except Exception as failure:
        return None, 0.0, f"failed: {describe(failure)}"
    if error <= target.bar:
        return decoder, error, ""
    return None, error, f"wrong: logits are off by {error:.3g} of their norm where {target.bar:.3g} passes"


def _time_in_turns(
    case: LlamaCase,
    decoders: dict[str, Decoder],
    time_turn: Callable[[Decoder], dict[str, float]],
    rounds: int,
    results: Results,
) -> None:
    figures: dict[str, dict[str, list[float]]] = {name: {} for name in decoders}
    for name in take_turns(list(decoders), rounds):
        if name not in figures:
            continue
        try:
            with uncollected():
                turn = time_turn(decoders[name])
        except Exception as error:
            results.skips.append(Skip(case, name, f"failed: {describe(error)}"))
            del figures[name]
            continue
        for metric, value in turn.items():
            figures[name].setdefault(metric, []).append(value)
    for name, metrics in figures.items():
        results.rows += [Row(case, name, metric, median(values)) for metric, values in metrics.items()]


def time_decode(decoder: Decoder, length: int, *, tokens: int, steps: int, gauge: Gauge) -> dict[str, float]:
    """One turn: milliseconds a token of a loop that is waited for once, at its end, and of the median single step.

    Both have `length` tokens in their middle, as the floor has. Loops of few tokens say less, so their number is a
    figure too.
    """
    tokens, steps = min(tokens, length - 1), min(steps, length - 1)
    decoder.set_length(length - 1)
    decoder.decode(1)
    decoder.set_length(length - tokens // 2)
    start = gauge.seconds()
    decoder.decode(tokens)
    loop_ms = (gauge.seconds() - start) * 1e3 / tokens
    decoder.set_length(length - steps // 2)
    times = [gauge.seconds()]
    for _ in range(steps):
        decoder.decode(1)
        times.append(gauge.seconds())
    step_ms = median(end - start for start, end in pairwise(times)) * 1e3
    return {"loop_ms": loop_ms, "loop_tokens": tokens, "step_ms": step_ms}


def time_prefill(decoder: Decoder, target: Target, gauge: Gauge) -> dict[str, float]:
    """One turn: milliseconds until the prompt's keys and values are in the cache and its last logits are there."""
    decoder.set_length(0)
    decoder.forward(target.tokens)
    decoder.set_length(0)
    start = gauge.seconds()
    decoder.forward(target.tokens)
    return {"prefill_ms": (gauge.seconds() - start) * 1e3}
