"""Decode latency of one sequence by length: FlashCore beside Hugging Face's sdpa, eager and compiled."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from flashcore_ops import make_static_cache
from flashcore_ops.decode_step import make_decode_step
from flashcore_ops.kv_memory import KVShape
from flashcore_ops.uncollected import uncollected
from flashcore_ops.validation.scenarios import Result
from flashcore_ops.validation.subject import Subject
from flashcore_ops.validation.tokens import patched

LENGTHS = (512, 1024, 2048, 4096)
FLASHCORE, SDPA_EAGER, SDPA_COMPILED = "FlashCore", "sdpa, eager", "sdpa, compiled"
MARK_MS, MARK_LENGTH = 10.0, 2048
_WARM_UP, _STEPS, _REPEATS = 4, 16, 3


@dataclass(frozen=True)
class Latency:
    """Milliseconds a decoded token, with `length` tokens in the cache."""

    impl: str
    length: int
    ms: float


def measure_latencies(subject: Subject, lengths: Sequence[int] = LENGTHS) -> Iterator[Latency]:
    """Yields each figure as it is measured. Keys and values are random: a step costs the same on any."""
    for length in lengths:
        with patched(subject) as model:
            yield Latency(FLASHCORE, length, _time(subject, _flashcore_step(model, length)))
        yield Latency(SDPA_EAGER, length, _time(subject, _eager_step(subject, length)))
        if subject.device.type == "cuda":
            yield Latency(SDPA_COMPILED, length, _time(subject, _compiled_step(subject, length)))


def judge(latencies: Sequence[Latency]) -> Result:
    """Whether a token at the mark's length comes within its time."""
    ours = {latency.length: latency.ms for latency in latencies if latency.impl == FLASHCORE}
    name = f"{MARK_MS:.0f} ms a token at {MARK_LENGTH}"
    if MARK_LENGTH not in ours:
        return Result(name, passed=False, evidence="not measured")
    ms = ours[MARK_LENGTH]
    others = [
        f"{latency.impl} {latency.ms:.2f}"
        for latency in latencies
        if latency.length == MARK_LENGTH and latency.impl != FLASHCORE
    ]
    evidence = "; ".join([f"{ms:.2f} ms", *others])
    return Result(name, passed=ms <= MARK_MS, evidence=evidence, figures={"ms_per_token": ms})


def _time(subject: Subject, run: Callable[[], object]) -> float:
    """The median over some repeats of the mean milliseconds of steps that wait for nothing in between."""
    with torch.no_grad(), uncollected():
        for _ in range(_WARM_UP):
            run()
        times = []
        for _ in range(_REPEATS):
            _wait(subject.device)
            start = time.perf_counter()
            for _ in range(_STEPS):
                run()
            _wait(subject.device)
            times.append((time.perf_counter() - start) * 1e3 / _STEPS)
    return statistics.median(times)


def _flashcore_step(model: Any, length: int) -> Callable[[], object]:
    cache = make_static_cache(model, 1, length + _num_steps())
    for layer in cache.layers:
        layer.keys.normal_()
        layer.values.normal_()
    step = make_decode_step(model, cache)
    step.length.fill_(length)
    return step.run


def _eager_step(subject: Subject, length: int) -> Callable[[], object]:
    model: Any = subject.model
    cache = DynamicCache(config=model.config)
    for layer, states in zip(cache.layers, _random_layers(subject, length), strict=True):
        layer.update(*states)
    token = torch.zeros(1, 1, dtype=torch.int64, device=subject.device)
    return lambda: model(input_ids=token, past_key_values=cache, use_cache=True).logits[:, -1].argmax(dim=-1)


def _compiled_step(subject: Subject, length: int) -> Callable[[], object]:
    model: Any = subject.model
    cache = StaticCache(config=model.config, max_cache_len=length + _num_steps())
    for layer, states in zip(cache.layers, _random_layers(subject, length), strict=True):
        layer.update(*states)
    token = torch.zeros(1, 1, dtype=torch.int64, device=subject.device)

    def greedy() -> Tensor:
        tokens: Tensor = model(input_ids=token, past_key_values=cache, use_cache=True).logits[:, -1].argmax(dim=-1)
        return tokens

    return torch.compile(greedy, mode="reduce-overhead", fullgraph=True)


def _random_layers(subject: Subject, length: int) -> list[tuple[Tensor, Tensor]]:
    """Keys and values `[1, Hkv, length, D]` of each layer."""
    shape = KVShape.of(subject.model.config)

    def states() -> Tensor:
        size = (1, shape.num_kv_heads, length, shape.head_dim)
        return torch.randn(size, dtype=subject.dtype, device=subject.device)

    return [(states(), states()) for _ in range(shape.num_layers)]


def _num_steps() -> int:
    return _WARM_UP + _REPEATS * _STEPS


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
