"""Every implementation is checked, then those that are right are timed."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from transformers import LlamaConfig

from bench import llama_runs
from bench.decoders import FLASHCORE_LOOP, IMPLEMENTATIONS, layers_of
from bench.gauge import CudaGauge
from bench.llama_cases import MARGIN_BYTES, LlamaCase
from bench.logits import fill_randomly, logits_of, make_target, relative_error
from bench.models import share
from bench.results import is_failure
from flashcore_ops import make_static_cache
from flashcore_ops.model_shapes import random_model
from tests.bench_llama.tiny import (
    COMPILED,
    DECODE,
    EAGER,
    HF_COMPILED,
    HF_EAGER,
    LOOP,
    PREFILL,
    TINY,
    FakeGauge,
    measure,
    values,
)


@pytest.mark.parametrize("case", [DECODE, PREFILL, replace(DECODE, batch=1)], ids=str)
def test_every_implementation_is_right(models, compiled, case):
    results = measure(case, models, IMPLEMENTATIONS)
    timed = {impl for impl, metric in values(results, case) if metric == "logits_rel_err"}
    expected = {item.name for item in IMPLEMENTATIONS if item.why_not(case) is None}
    assert timed == expected
    assert {(skip.impl, skip.reason) for skip in results.skips} == (
        {("flashcore_loop", "cannot run: its graph is one decode step")} if case.kind == "prefill" else set()
    )
    assert compiled == [{"mode": "reduce-overhead", "fullgraph": True}] * 2


@pytest.mark.parametrize("case", [DECODE, PREFILL, replace(DECODE, batch=1)], ids=str)
def test_each_is_compiled_once_and_as_one_graph(models, monkeypatch, case):
    """What is checked is what is timed: no tensor of a turn differs from those of the check in shape or strides."""
    compile_for_real, counters = torch.compile, []

    def compile_and_count(function, mode, fullgraph):
        counters.append(CompileCounter())
        return compile_for_real(function, backend=counters[-1], fullgraph=fullgraph)

    monkeypatch.setattr(torch, "compile", compile_and_count)
    results = measure(case, models, [HF_COMPILED, COMPILED])
    assert results.skips == []
    assert [counter.frame_count for counter in counters] == [1, 1]


def test_figures_of_a_decode_case(models, compiled):
    figures = values(measure(DECODE, models, [HF_EAGER, LOOP]), DECODE)
    assert figures["floor", "loop_ms"] == models.sizes.floor_ms(DECODE, read_tbs=3.0)
    # Two readings around a loop, one after each step.
    assert figures["hf_eager", "loop_ms"] == pytest.approx(5 / 3)
    assert figures["hf_eager", "loop_tokens"] == 3
    assert figures["flashcore_loop", "loop_ms"] == pytest.approx(5 / 8)
    assert figures["flashcore_loop", "loop_tokens"] == 8
    assert figures["flashcore_loop", "step_ms"] == pytest.approx(5)
    assert figures["flashcore_loop", "peak_gib"] == 3.0
    # The keys and values that others share are not its own.
    cache_gib = models.sizes.cache_bytes(DECODE) / 2**30
    assert figures["hf_eager", "peak_gib"] == pytest.approx(3.0 - cache_gib)


def test_eager_decoders_take_short_turns_among_themselves(models, compiled, monkeypatch):
    turns = []

    def note(decoder, length, *, tokens, steps, gauge):
        turns.append((id(decoder), tokens, steps))
        return {}

    monkeypatch.setattr(llama_runs, "time_decode", note)
    measure(DECODE, models, [HF_EAGER, COMPILED, EAGER])
    assert [effort for _, *effort in turns] == [[8, 4]] * 2 + [[3, 2]] * 6
    assert [len({decoder for decoder, *_ in turns[start : start + 2]}) for start in (0, 2, 4, 6)] == [1, 2, 2, 2]


def test_figures_of_a_prefill_case(models):
    figures = values(measure(PREFILL, models, [HF_EAGER, EAGER]), PREFILL)
    assert figures["flashcore_eager", "prefill_ms"] == pytest.approx(5)
    assert ("floor", "loop_ms") not in figures


@torch.no_grad()
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=lambda item: item.name)
def test_decoding_feeds_greedy_tokens_back(models, compiled, implementation):
    """Token by token by hand, against the decoder's own loop over two different lengths."""
    cache = make_static_cache(models.patched, batch_size=3, max_cache_len=64)
    decoder = implementation.build(models, cache)
    for length in (20, 9):
        fill_randomly(cache)
        tokens, by_hand = torch.full((3, 1), 7), []
        decoder.set_length(length)
        for _ in range(4):
            by_hand.append(decoder.forward(tokens).clone())
            tokens = by_hand[-1].argmax(dim=-1, keepdim=True)
        fill_randomly(cache)
        decoder.set_length(length)
        start = decoder._step.tokens if implementation is FLASHCORE_LOOP else decoder._tokens
        start.fill_(7)
        decoder.decode(3)
        assert torch.equal(start, by_hand[2].argmax(dim=-1, keepdim=True))
        assert torch.equal(decoder.forward(start.clone()), by_hand[3])


@dataclass(frozen=True)
class Broken:
    """Hugging Face's eager model with its logits scaled, or a failure where it is told."""

    factor: float = 1.0
    fails_in: str = ""
    name: str = "flashcore_broken"
    is_eager: bool = True
    has_own_cache: bool = True

    def why_not(self, case):
        return None

    def extra_bytes(self, case, sizes):
        return 0

    def build(self, models, cache):
        decoder = HF_EAGER.build(models, cache)
        forward = decoder.forward
        decoder.forward = lambda tokens: forward(tokens) * self.factor

        def fail(*_):
            raise RuntimeError("first line\nsecond line")

        if self.fails_in:
            setattr(decoder, self.fails_in, fail)
        return decoder


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (Broken(factor=1.2), "wrong: logits are off by"),
        (Broken(factor=torch.nan), "wrong: logits are off by nan"),
        (Broken(fails_in="forward"), "failed: RuntimeError: first line"),
        (Broken(fails_in="decode"), "failed: RuntimeError: first line"),
    ],
    ids=lambda item: item if isinstance(item, str) else "",
)
def test_wrong_and_failing_implementations_have_no_times(models, broken, reason):
    results = measure(DECODE, models, [broken, HF_EAGER])
    figures = values(results, DECODE)
    assert ("hf_eager", "loop_ms") in figures
    assert (broken.name, "loop_ms") not in figures
    assert [skip.impl for skip in results.skips] == [broken.name]
    assert results.skips[0].reason.startswith(reason)
    assert is_failure(results.skips[0])


@torch.no_grad()
def test_check_sees_a_part_of_the_past_missing(models):
    """The bar is tight: five of twenty keys, in one of the sequences, move the logits past it."""
    cache = make_static_cache(models.patched, batch_size=3, max_cache_len=128)
    target = make_target(models, cache, DECODE)
    assert target.tokens.shape == (3, 4)
    assert target.exact.shape == (2, 4, 96)
    decoder = EAGER.build(models, cache)
    assert relative_error(logits_of(decoder, target), target.exact) <= target.bar
    fill_randomly(cache)
    for key, _ in layers_of(cache):
        key[2, :, :5] = 0
    assert relative_error(logits_of(decoder, target), target.exact) > 2 * target.bar


def test_what_does_not_fit_is_skipped(models):
    too_large = measure(DECODE, models, [HF_EAGER, EAGER], gauge=FakeGauge(free=MARGIN_BYTES))
    assert [row.impl for row in too_large.rows] == ["floor"]
    assert [skip.impl for skip in too_large.skips] == ["hf_eager", "flashcore_eager"]
    assert all(skip.reason.startswith("cannot run: needs 2.1 GB") for skip in too_large.skips)
    assert not is_failure(too_large.skips[1])


def test_a_case_that_fails_as_a_whole(models):
    results = measure(replace(DECODE, capacity=0), models, [EAGER])
    assert [skip.impl for skip in results.skips] == ["flashcore_eager"]
    assert results.skips[0].reason.startswith("failed: OptionError: max_cache_len")


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["decode", pytest.param("prefill", marks=pytest.mark.slow)])
def test_a_case_on_the_gpu(kind):
    """Every implementation compiles and captures, and is right, on a small model."""
    config = LlamaConfig(**(TINY.to_dict() | {"hidden_size": 512, "head_dim": 128, "intermediate_size": 1024}))
    models = share("small", random_model(config, torch.bfloat16, torch.device("cuda")))
    case = LlamaCase(kind, "small", layers=2, batch=1, length=256, capacity=320)
    results = measure(case, models, IMPLEMENTATIONS, gauge=CudaGauge())
    timed = {row.impl for row in results.rows if row.metric == ("loop_ms" if kind == "decode" else "prefill_ms")}
    assert timed - {"floor"} == {item.name for item in IMPLEMENTATIONS if item.why_not(case) is None}
    assert all(0 < row.value < 10_000 for row in results.rows if row.metric.endswith("_ms"))
