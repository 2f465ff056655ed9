"""bench.attention: a wrong result is never timed, a failing case ends nothing, results of earlier runs are kept."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
import typer
from rich.console import Console
from torch.nn.attention import SDPBackend
from typer.testing import CliRunner

from bench import attention, eager, first_call, report
from bench.attention_marks import MARKS
from bench.attention_runs import measure_case, measure_cases
from bench.case_groups import CHUNKED, GROUPS, QUICK
from bench.cases import Case
from bench.figures import Figures
from bench.harness import Timing, time_interleaved
from bench.peers import IMPLEMENTATIONS, SHOWN
from bench.peers.sdpa import Sdpa
from bench.report import render_group, render_host, render_skips
from bench.results import Results, Row, Skip
from tests.bench_cases import CEILINGS, DECODE, PREFILL, generator

MATH = Sdpa("sdpa_math", SDPBackend.MATH)


@dataclass(frozen=True)
class Scaled:
    """A right answer times a factor, or an exception."""

    name: str
    factor: float

    def why_not(self, inputs):
        return "it is told not to" if self.factor == 0 else None

    def prepare(self, sets):
        if self.factor < 0:
            raise RuntimeError("first line\nsecond line")
        return [lambda call=call: call() * self.factor for call in MATH.prepare(sets)]


class OneToken(Scaled):
    """Fewer tokens than it was asked for."""

    def prepare(self, sets):
        return [lambda call=call: call()[:, :, :1] for call in MATH.prepare(sets)]


@dataclass
class FakeTimer:
    """Remembers what it was asked to time, and runs it; 2 us each, and one named failure."""

    timed: tuple[str, ...] = ()
    outputs: tuple[torch.Tensor, ...] = ()

    def __call__(self, calls, inputs, num_calls):
        self.timed += tuple(calls)
        assert num_calls % len(inputs) == 0
        self.outputs += tuple(call(number) for call in calls.values() for number in inputs)
        failures = {name: "capture failed" for name in calls if name == "uncapturable"}
        return Timing({name: 2.0 for name in calls if name not in failures}, failures)


def measure_small(case, implementations, timer):
    return measure_case(case, implementations, ceilings=CEILINGS, l2_bytes=1000, generator=generator(), timer=timer)


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (Scaled("other", 1.3), "wrong: error"),
        (Scaled("other", torch.nan), "wrong: error nan"),
        (OneToken("other", 1.0), "wrong: gave torch.bfloat16 [3, 6, 1, 16]"),
        (Scaled("other", -1.0), "failed: RuntimeError: first line"),
        (Scaled("other", 0.0), "cannot run: it is told not to"),
    ],
)
def test_wrong_results_are_never_timed(other, reason):
    timer = FakeTimer()
    results = measure_small(PREFILL, [Scaled("right", 1.0), other], timer)
    assert timer.timed == ("right",)
    assert {row.impl for row in results.rows} == {"floor", "right"}
    assert [skip.impl for skip in results.skips] == ["other"]
    assert results.skips[0].reason.startswith(reason)


def test_every_input_set_has_its_turn():
    timer = FakeTimer()
    packed = replace(MATH, name="sdpa_math_packed", is_packed=True)
    measure_small(DECODE, [MATH, packed], timer)
    assert {len(output.shape) for output in timer.outputs} == {4, 5}
    sums = [output.double().sum().item() for output in timer.outputs]
    half = len(sums) // 2
    assert half >= 2
    assert len(set(sums[:half])) == half
    assert sums[:half] == pytest.approx(sums[half:], abs=0.5)


def test_rows_of_a_case():
    results = measure_small(PREFILL, [Scaled("right", 1.0), Scaled("uncapturable", 1.0)], FakeTimer())
    assert results.skips == [Skip(PREFILL, "uncapturable", "failed: capture failed")]
    values = {row.metric: row.value for row in results.rows if row.impl == "right"}
    assert values.pop("us") == 2.0
    assert values.pop("tflops") == PREFILL.num_flops / 2.0 / 1e6
    assert 0 < values.pop("max_abs_err") < 0.1
    assert not values
    decode = {(row.impl, row.metric): row.value for row in measure_small(DECODE, [MATH], FakeTimer()).rows}
    assert decode["sdpa_math", "tbs"] == DECODE.num_bytes / 2.0 / 1e6
    assert decode["floor", "us"] == DECODE.num_bytes / 3.0 / 1e6
    assert decode["floor", "tbs"] == pytest.approx(3.0)


def test_a_failing_case_does_not_end_the_run():
    broken = replace(DECODE, num_kv_heads=4)
    options = {"ceilings": CEILINGS, "l2_bytes": 1000, "generator": generator(), "timer": FakeTimer()}
    first, second = measure_cases([broken, DECODE], [MATH], **options)
    assert [len(first.skips), len(second.skips)] == [1, 0]
    assert first.skips[0].reason.startswith("failed: ")
    assert {row.impl for row in second.rows} == {"floor", "sdpa_math"}


def figures_of(rows, read_tbs=3.0):
    return Figures.of({"rows": [row.to_json() for row in rows], "meta": {"ceilings": {"read_tbs": read_tbs}}})


def columns_of(table):
    return {column.header: list(column.cells) for column in table.columns}


def test_a_table_has_the_speed_over_the_best_peer():
    values = [("floor", 1.0), ("flashcore", 4.0), ("flashcore_portable", 3.0), ("a", 5.0), ("b", 6.0)]
    rows = [Row(DECODE, impl, "us", us) for impl, us in values]
    rows += [Row(PREFILL, impl, "us", us) for impl, us in values] + [Row(PREFILL, "a", "tflops", 123.4)]
    names = ["floor", "flashcore", "a", "b", "absent"]
    decode, prefill = render_group("mixed", [DECODE, PREFILL], names, figures_of(rows))
    label = "3 x 63, 6:2, D=16"
    assert columns_of(decode) == {
        "B x S": [label],
        "floor": ["1.00"],
        "flashcore": ["4.00"],
        "a": ["5.00"],
        "b": ["6.00"],
        "speed\n/ best\npeer": ["1.25"],
    }
    assert columns_of(prefill) == {"B x S": [label], "a": ["123"], "speed\n/ best\npeer": ["1.25"]}


@pytest.mark.parametrize("group", GROUPS)
def test_tables_fit_a_log(group):
    names = ["floor", *(item.name for item in SHOWN)]
    cases = GROUPS[group]
    # What has no figures at decode, and at prefill.
    apart = {True: ("portable", "fa3"), False: ("packed", "paged", "floor")}
    rows = [
        Row(case, name, metric, 12345.0)
        for case in cases
        for name in names
        for metric in ("us", "tflops")
        if not any(part in name for part in apart[case.is_decode])
    ]
    for table in render_group(group, cases, names, figures_of(rows)):
        console = Console(width=120)
        with console.capture() as capture:
            console.print(table)
        text = capture.get()
        assert "…" not in text
        lines = [line for line in text.splitlines() if "12345" in line]
        assert len(lines) == table.row_count
        assert all(len(line.rstrip()) <= 120 for line in lines)


def test_skips_are_grouped():
    cases = [DECODE, PREFILL, *CHUNKED]
    assert render_skips([Skip(case, "absent", "cannot run: no") for case in cases]) == [
        "skipped absent, cannot run: no (decode 3 x 63, 6:2, D=16, prefill 3 x 63, 6:2, D=16, "
        "prefill 1 x 8192, Q=2048 and 1 more)"
    ]


def test_the_host_has_a_table_of_its_own():
    decode, prefill = eager.CASES
    rows = [Row(decode, "flashcore", "host_us", 8.0), Row(decode, "sdpa", "host_us", 7.5)]
    rows += [Row(first_call.CASES["prefill"], "flashcore", "cold_ms", 2500.0)]
    table = render_host([decode, prefill, *first_call.CASES.values()], eager.IMPLS, figures_of(rows))
    assert columns_of(table) == {
        "case": ["eager decode 1 x 2048", "first_call prefill 1 x 2048"],
        "metric": ["host_us", "cold_ms"],
        "flashcore": ["8.00", "2500"],
        "sdpa": ["7.50", "-"],
    }


@pytest.fixture
def measured(monkeypatch):
    """The command around measurements that are made up: 7.25 of everything. Gives the cases that it asks for."""
    asked = []

    def measure(groups, host_groups, ceilings, l2_bytes, repeats):
        asked.append(([case for cases in groups.values() for case in cases], list(host_groups), repeats))
        for case in asked[-1][0]:
            rows = [Row(case, item.name, metric, 7.25) for item in SHOWN[:3] for metric in ("us", "tflops")]
            yield case, Results(rows, [Skip(case, failing[0], "failed: [odd] text")])

    failing = ["sdpa_flash"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    gpu = SimpleNamespace(name="Some GPU", L2_cache_size=2**20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    monkeypatch.setattr(attention, "measure_ceilings", lambda repeats: CEILINGS)
    monkeypatch.setattr(attention, "measure", measure)
    return SimpleNamespace(asked=asked, failing=failing)


def run(*words):
    app = typer.Typer()
    app.command()(attention.main)
    return CliRunner().invoke(app, list(words))


GEOMETRIC_MEAN = re.compile(r"the same, geometric mean\W+>= 1.15\W+1.00\W+all twelve\W+1 of 1\W+NO")


@pytest.mark.parametrize(("failing", "status"), [("sdpa_flash", 0), ("flashcore", 1), ("flashcore_portable", 1)])
def test_command(measured, tmp_path, failing, status):
    measured.failing[0] = failing
    finished = run("--quick", "--output", str(tmp_path), "--commit", "abc")
    assert finished.exit_code == status, finished.output
    written = json.loads((tmp_path / "some-gpu" / "attention-quick.json").read_text())
    assert len(written["skips"]) == sum(map(len, QUICK.values()))
    assert written["meta"]["commit"] == "abc"
    assert f"skipped {failing}, failed: [odd] text (decode 1 x 512, decode 1 x 8192, decode 32 x 2048 and 2 more)" in (
        finished.output
    )
    assert "7.25" in finished.output
    assert "no plots" in finished.output
    assert "the same, geometric mean" not in finished.output


def test_groups_are_measured_in_parts(measured, tmp_path):
    common = ["--output", str(tmp_path), "--commit", "abc"]
    first = run("--groups", "decode", *common)
    assert first.exit_code == 0, first.output
    plots = {f"attention-decode-{theme}.svg" for theme in ("dark", "light")}
    assert {path.name for path in (tmp_path / "some-gpu" / "plots").iterdir()} == plots
    assert f"{min(plots)}\n" in first.output
    # FlashCore and its one peer are as fast as each other, and a mark is above that.
    assert GEOMETRIC_MEAN.search(first.output)
    second = run("--groups", "eager, chunked", *common)
    assert second.exit_code == 0, second.output
    assert measured.asked == [
        (list(GROUPS["decode"]), [], 20),
        (list(CHUNKED), ["eager"], 20),
    ]
    rows = json.loads((tmp_path / "some-gpu" / "attention.json").read_text())["rows"]
    assert len({json.dumps(row["case"]) for row in rows}) == 12 + 2
    # The summary is of all that the file holds.
    assert GEOMETRIC_MEAN.search(second.output)
    assert run("--groups", "chunked", *common[:2], "--commit", "other").exit_code == 0
    rows = json.loads((tmp_path / "some-gpu" / "attention.json").read_text())["rows"]
    assert len({json.dumps(row["case"]) for row in rows}) == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--groups", "decode,odd"], "expected groups out of"),
        (["--groups", ""], "expected groups out of"),
        (["--quick", "--groups", "decode"], "got both"),
    ],
)
def test_bad_options(words, said):
    finished = run(*words)
    assert finished.exit_code == 2
    assert said in " ".join(finished.output.split())


def test_each_case_of_several_groups_is_measured_once(monkeypatch):
    asked, source = [], generator()

    def measure_nothing(cases, *_, **__):
        asked.extend(cases)
        return (Results() for _ in cases)

    monkeypatch.setattr(attention, "measure_cases", measure_nothing)
    monkeypatch.setattr(torch, "Generator", lambda device: source)
    monkeypatch.setattr(attention, "measure_eager", lambda case, *_: Results([Row(case, "sdpa", "host_us", 1.0)]))
    monkeypatch.setattr(attention, "measure_first_call", lambda name: Results())
    groups = {"prefill": GROUPS["prefill"], "windowed": GROUPS["windowed"]}
    measured = dict(attention.measure(groups, attention.HOST_GROUPS, CEILINGS, l2_bytes=1, repeats=1))
    assert len(asked) == len(set(asked)) == 7 + 4
    assert list(measured) == [*asked, *eager.CASES, *first_call.CASES.values()]


@pytest.mark.gpu
@pytest.mark.parametrize("case", [Case(batch=1, query_len=1, kv_len=512), Case(batch=2, query_len=512, kv_len=512)])
def test_a_case_on_the_gpu(case):
    def timer(calls, inputs, num_calls):
        return time_interleaved(calls, inputs, num_calls=num_calls, repeats=3)

    source = torch.Generator("cuda").manual_seed(0)
    options = {"ceilings": CEILINGS, "l2_bytes": 2**20, "generator": source, "timer": timer}
    (results,) = measure_cases([case], IMPLEMENTATIONS, **options)
    timed = {row.impl: row.value for row in results.rows if row.metric == "us"}
    assert 0.5 < timed["flashcore"] < 10_000
    assert "flex" in timed
    assert ("flashcore_portable" in timed) == (case.query_len > 1)
    assert not [skip for skip in results.skips if not skip.reason.startswith("cannot run")]


def test_the_summary_fits_a_log():
    rows = [Row(case, impl, "us", 1000.0) for case in GROUPS["decode"] for impl in ("flashcore", "sdpa_cudnn")]
    console = Console(width=120)
    with console.capture() as capture:
        console.print(*report.render_marks(MARKS, figures_of(rows)))
    assert "…" not in capture.get()
    assert "1.00" in capture.get()
