"""The marks that bench.llama judges, from made-up rows."""

from __future__ import annotations

import pytest

from bench.figures import Figures
from bench.llama_cases import ROOMY_CAPACITY
from bench.llama_marks import DECODE, FIRST_TOKEN, MARKS, ROOMY, TIGHT
from bench.marks import judge_marks
from bench.results import Row

MANY = DECODE[-1]


def everything_kept():
    """Figures by which every mark holds, and would not by much less."""
    figures = {
        (FIRST_TOKEN, "flashcore_loop", "cold_ms"): 39_000.0,
        (FIRST_TOKEN, "flashcore_loop", "warm_ms"): 9_900.0,
    }
    for case in DECODE:
        loop = 1.14 if case.batch > 1 else 1.06 if case.length == 2048 else 1.09
        figures |= {
            (case, "floor", "loop_ms"): 1.0,
            (case, "flashcore_loop", "loop_ms"): loop,
            (case, "flashcore_loop", "step_ms"): loop + 0.39,
            (case, "hf_eager", "loop_ms"): 20.0,
            (case, "flashcore_eager", "loop_ms"): 20.2,
        }
    return figures


def held(figures):
    rows = [Row(*key, value).to_json() for key, value in figures.items()]
    content = {"rows": rows, "meta": {"ceilings": {"read_tbs": 3.0}}}
    return {verdict.mark.claim: verdict.holds for verdict in judge_marks(MARKS, Figures.of(content))}


def test_every_mark_can_hold():
    assert set(held(everything_kept()).values()) == {True}
    assert set(held({}).values()) == {None}


BREACHES = {
    "decode, batch 1: time over the floor": (DECODE[0], "flashcore_loop", "loop_ms", 1.11),
    "the same at 2048": (TIGHT, "flashcore_loop", "loop_ms", 1.08),
    "the same, batches 8 and 32": (MANY, "flashcore_loop", "loop_ms", 1.16),
    "decode, roomy cache: time over a tight one's": (TIGHT, "flashcore_loop", "loop_ms", 1.03),
    "decode: ms that waiting for each step adds": (MANY, "flashcore_loop", "step_ms", 1.55),
    "decode, eager: time over Hugging Face's": (MANY, "flashcore_eager", "loop_ms", 20.5),
    "first token, cold: ms": (FIRST_TOKEN, "flashcore_loop", "cold_ms", 41_000.0),
    "first token, warm: ms": (FIRST_TOKEN, "flashcore_loop", "warm_ms", 11_000.0),
}


def test_every_mark_has_a_breach():
    assert set(BREACHES) == set(held({}))


@pytest.mark.parametrize("claim", BREACHES)
def test_every_mark_can_fail(claim):
    *key, value = BREACHES[claim]
    assert held(everything_kept() | {tuple(key): value})[claim] is False


def test_the_roomy_case_is_the_tight_one_in_a_larger_cache():
    assert (ROOMY.length, ROOMY.capacity) == (TIGHT.length, ROOMY_CAPACITY)
    assert TIGHT.capacity < ROOMY_CAPACITY
