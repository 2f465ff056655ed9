"""The marks that bench.attention judges, from made-up rows; and the two measurements of the host."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import eager, first_call, fresh_process
from bench.attention_marks import LARGE, MARKS, NEAR_FLOOR
from bench.case_groups import DECODE, GROUPS, HEAD_DIMS, PADDED, SPECULATIVE, WINDOWED, decode, prefill
from bench.eager import measure_eager, time_host
from bench.figures import Figures
from bench.marks import judge_marks
from bench.report import render_marks
from bench.results import Row, Skip
from tests import bench_cases

ROOT = Path(__file__).parent.parent


def figures_of(rows, read_tbs=3.0):
    return Figures.of({"rows": [row.to_json() for row in rows], "meta": {"ceilings": {"read_tbs": read_tbs}}})


def rows_of(case, metric="us", **values):
    return [Row(case, impl, metric, value) for impl, value in values.items()]


def everything_kept():
    """Rows by which every mark holds, and would not by much less."""
    rows = []
    for case in dict.fromkeys(case for group in GROUPS.values() for case in group):
        if case.is_decode:
            # At 95% of the read rate, but for the two that have marks of their own.
            ours = {decode(1, 512): 3.9, decode(1, 2048): 5.9}.get(case, case.num_kv_bytes / 3.0e6 / 0.95)
            peer = ours * (0.995 if case in NEAR_FLOOR else 1.3)
            rows += rows_of(case, flashcore=ours, sdpa_cudnn=peer, sdpa_flash=2 * peer)
            continue
        ours = case.num_flops / 630.0 / 1e6
        times = {"flashcore": ours, "flashcore_portable": 1.3 * ours, "flashcore_no_range": ours}
        rows += rows_of(case, **times, sdpa_cudnn=1.01 * ours, sdpa_flash=1.5 * ours, flex=1.4 * ours)
        rows += rows_of(case, "tflops", flashcore=630.0)
    for case in eager.CASES:
        rows += rows_of(case, "host_us", flashcore=8.0, sdpa=7.0)
    for case in first_call.CASES.values():
        rows += rows_of(case, "cold_ms", flashcore=2900.0)
    return rows


def held(rows):
    return {verdict.mark.claim + verdict.mark.bound: verdict.holds for verdict in judge_marks(MARKS, figures_of(rows))}


def test_every_mark_can_hold():
    assert set(held(everything_kept()).values()) == {True}


OTHER = "decode, D=64 and 256, 7:1, 8:1: speed over the best peer"
BREACHES = [
    ("decode: speed over the best peer>= 1", decode(8, 512), "sdpa_flash", "us", 0.3),
    ("the same, near the floor>= 0.99", NEAR_FLOOR[0], "sdpa_cudnn", "us", 0.99),
    ("decode: us<= 4", decode(1, 512), "flashcore", "us", 1.05),
    ("decode: us<= 6", decode(1, 2048), "flashcore", "us", 1.05),
    ("decode over 256 MB: part of the read rate>= 0.92", decode(128, 2048), "flashcore", "us", 1.04),
    (OTHER + ">= 1", HEAD_DIMS[0], "sdpa_cudnn", "us", 0.7),
    ("decode, Q=2 to 8: speed over the best peer>= 1", SPECULATIVE[0], "sdpa_cudnn", "us", 0.7),
    ("prefill, portable: speed over FlexAttention>= 1", prefill(512), "flex", "us", 0.9),
    ("prefill, portable: speed over FlashAttention-2>= 1", prefill(32768), "sdpa_flash", "us", 0.8),
    ("prefill, 512 to 2048: speed over cuDNN>= 1", prefill(2048), "sdpa_cudnn", "us", 0.98),
    ("prefill, 4096 on: speed over cuDNN>= 1", prefill(4096), "sdpa_cudnn", "us", 0.98),
    ("the same, not to be left below>= 0.9", prefill(16384), "sdpa_cudnn", "us", 0.88),
    ("prefill: TFLOP/s>= 620", prefill(16384), "flashcore", "tflops", 0.98),
    ("prefill, windowed: TFLOP/s over those without>= 0.8", WINDOWED[-1], "flashcore", "tflops", 0.75),
    ("prefill, left-padded: time over that without<= 1.02", PADDED[-1], "flashcore", "us", 2.0),
    ("prefill, kv_range: time over that without<= 1.02", prefill(512), "flashcore_no_range", "us", 0.95),
    ("eager call: host time over SDPA's<= 1.2", eager.CASES[1], "sdpa", "host_us", 0.9),
    ("first call, cold: ms<= 3000", first_call.CASES["decode"], "flashcore", "cold_ms", 1.1),
]


def test_every_mark_has_a_breach():
    # The mean has a test of its own.
    assert {claim for claim, *_ in BREACHES} == set(held([])) - {"the same, geometric mean>= 1.15"}


@pytest.mark.parametrize(("claim", "case", "impl", "metric", "factor"), BREACHES)
def test_every_mark_can_fail(claim, case, impl, metric, factor):
    rows = [
        Row(row.case, row.impl, row.metric, row.value * factor)
        if (row.case, row.impl, row.metric) == (case, impl, metric)
        else row
        for row in everything_kept()
    ]
    assert held(everything_kept())[claim] is True
    assert held(rows)[claim] is False


def test_the_mean_is_over_the_whole_table():
    speedups = [1.0, 2.0] * 6
    rows = [
        row
        for case, speedup in zip(DECODE, speedups, strict=True)
        for row in rows_of(case, floor=0.1, flashcore=10.0, flashcore_portable=1.0, a=10.0 * speedup, b=90.0)
    ]
    assert figures_of(rows).mean_speedup(DECODE) == pytest.approx(2**0.5)
    assert figures_of(rows[:-5]).mean_speedup(DECODE) is None
    assert held(rows)["the same, geometric mean>= 1.15"] is True
    assert held(rows[:-5])["the same, geometric mean>= 1.15"] is None


def test_a_mark_is_open_until_all_is_measured_or_one_breaks_it():
    claim = "prefill, 512 to 2048: speed over cuDNN>= 1"
    fast = rows_of(prefill(512), flashcore=1.0, sdpa_cudnn=1.1)
    slow = rows_of(prefill(1024), flashcore=1.0, sdpa_cudnn=0.9)
    assert held([])[claim] is None
    assert held(fast)[claim] is None
    assert held(fast + slow)[claim] is False


def test_the_worst_case_is_named():
    rows = rows_of(prefill(512), flashcore=1.0, sdpa_cudnn=1.1) + rows_of(prefill(1024), flashcore=1.0, sdpa_cudnn=0.9)
    rows += rows_of(eager.CASES[0], "host_us", flashcore=9.0, sdpa=5.0)
    rows += rows_of(eager.CASES[1], "host_us", flashcore=5.0, sdpa=5.0)
    table, count = render_marks(MARKS, figures_of(rows))
    lines = list(zip(*(column.cells for column in table.columns), strict=True))
    assert ("prefill, 512 to 2048: speed over cuDNN", ">= 1", "0.90", "prefill 16 x 1024", "2 of 3", "NO") in lines
    assert ("eager call: host time over SDPA's", "<= 1.2", "1.80", "eager decode 1 x 2048", "2 of 2", "NO") in lines
    assert len(lines) == 2
    assert count == f"marks: 0 yes, 2 NO, {len(MARKS) - 2} open"


def test_large_caches():
    assert all(case.num_kv_bytes > 256e6 for case in LARGE)
    assert {str(case) for case in DECODE if case in LARGE} == {
        "decode 1 x 131072",
        "decode 8 x 8192",
        "decode 32 x 2048",
        "decode 32 x 8192",
        "decode 64 x 2048",
        "decode 128 x 2048",
    }


@pytest.mark.parametrize("mark", MARKS, ids=lambda mark: mark.claim + mark.bound)
def test_marks_are_of_cases_that_are_measured(mark):
    measured = {case for group in GROUPS.values() for case in group}
    measured |= {*eager.CASES, *first_call.CASES.values(), "all twelve"}
    assert set(mark.cases)
    assert set(mark.cases) <= measured
    assert math.isfinite(mark.at_least) != math.isfinite(mark.at_most)


def small(case):
    return replace(case, case=replace(case.case, kv_len=48, query_len=min(case.case.query_len, 48), head_dim=16))


@pytest.mark.parametrize("case", eager.CASES, ids=str)
def test_eager_cost(case):
    results = measure_eager(small(case), bench_cases.generator(), repeats=3, synchronize=lambda: None)
    assert not results.skips
    times = {row.impl: row.value for row in results.rows}
    assert {row.metric for row in results.rows} == {"host_us"}
    assert set(times) == set(eager.IMPLS)
    assert all(value > 0 for value in times.values())


def test_wrong_or_failing_calls_are_not_timed(monkeypatch):
    calls_on = eager.calls_on

    def broken(inputs):
        right = calls_on(inputs)
        return right | {"flashcore": lambda: right["flashcore"]() * 1.5, "sdpa": lambda: 1 / 0}

    monkeypatch.setattr(eager, "calls_on", broken)
    case = small(eager.CASES[1])
    results = measure_eager(case, bench_cases.generator(), repeats=2, synchronize=lambda: None)
    assert not results.rows
    assert [skip.impl for skip in results.skips] == ["flashcore", "sdpa"]
    assert results.skips[0].reason.startswith("wrong: error")
    assert results.skips[1] == Skip(case, "sdpa", "failed: ZeroDivisionError: division by zero")


def test_host_times_are_of_one_call_and_wait_only_between_bursts(monkeypatch):
    now, waits = [0.0], []
    costs = {"a": 2e-6, "b": 5e-6}

    def call(name):
        now[0] += costs[name]

    def synchronize():
        now[0] += 1.0
        waits.append(now[0])

    monkeypatch.setattr(eager.time, "perf_counter", lambda: now[0])
    times = time_host({name: lambda name=name: call(name) for name in costs}, repeats=5, synchronize=synchronize)
    assert times == {"a": pytest.approx(2.0), "b": pytest.approx(5.0)}
    assert len(waits) == 10


def test_first_calls_come_from_fresh_processes_with_fresh_caches(monkeypatch):
    runs = []

    def run(command, env, **_):
        runs.append((command[1:], env["TRITON_CACHE_DIR"]))
        if "prefill" in command:
            raise subprocess.CalledProcessError(1, command, stderr="Traceback\nRuntimeError: no\n")
        return SimpleNamespace(stdout=f"noise\n{1000.0 * len(runs)}\n")

    monkeypatch.setattr(fresh_process.subprocess, "run", run)
    case = first_call.CASES["decode"]
    rows = first_call.measure_first_call("decode").rows
    assert rows == [Row(case, "flashcore", "cold_ms", 1000.0), Row(case, "flashcore", "warm_ms", 2000.0)]
    skips = first_call.measure_first_call("prefill").skips
    assert skips == [Skip(first_call.CASES["prefill"], "flashcore", "failed: RuntimeError: no")]
    assert [words for words, _ in runs[:2]] == [["-m", "bench.first_call", "decode"]] * 2
    assert runs[0] == runs[1]
    assert runs[0][1] != runs[2][1]


class FakeGauge:
    """A second goes by between two readings."""

    def __init__(self):
        self.now = 0.0

    def seconds(self):
        self.now += 1.0
        return self.now


def test_a_first_call_is_timed_and_checked(monkeypatch):
    assert first_call.first_call_ms(bench_cases.DECODE, bench_cases.generator(), FakeGauge()) == 1000
    monkeypatch.setattr(first_call.flashcore_ops, "attention", lambda query, *_: torch.zeros_like(query))
    with pytest.raises(RuntimeError, match="wrong: error"):
        first_call.first_call_ms(bench_cases.DECODE, bench_cases.generator(), FakeGauge())


def test_a_fresh_process_has_no_triton_before_its_first_call():
    script = "import sys, bench.first_call; print('triton' in sys.modules)"
    finished = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert finished.stdout == "False\n"


@pytest.mark.gpu
@pytest.mark.slow
def test_the_host_on_a_gpu():
    source = torch.Generator("cuda").manual_seed(0)
    results = measure_eager(eager.CASES[0], source, repeats=3)
    assert {row.impl for row in results.rows if 0.5 < row.value < 1000} == set(eager.IMPLS)
    (cold, warm) = first_call.measure_first_call("decode").rows
    assert 0 < warm.value < cold.value < 120_000
