"""The command: options, tables, merged results, first tokens."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import typer
from typer.testing import CliRunner

from bench import first_token, fresh_process, llama
from bench.llama_cases import compile_case
from bench.llama_marks import FIRST_TOKEN, MARKS
from bench.llama_report import render_columns, render_decode
from bench.models import LLAMA_3_1_8B
from bench.results import Results, Row, Skip, merge, read_mergeable, write_results
from tests.bench_llama.tiny import CEILINGS, COMPILED, DECODE, EAGER, LOOP, PREFILL, FakeGauge

META = {"gpu": "Some GPU", "torch": "1", "triton": "2", "transformers": "3", "commit": "abc", "date": "today"}


def written(path):
    return {
        (row["case"]["S"], row["impl"], row["metric"]): row["value"] for row in json.loads(path.read_text())["rows"]
    }


def test_runs_of_the_same_commit_are_merged(tmp_path):
    old, other = DECODE, replace(DECODE, length=99)
    rows = [Row(old, "a", "loop_ms", 1.0), Row(old, "a", "peak_gib", 1.0), Row(old, "b", "loop_ms", 2.0)]
    write_results(tmp_path, "llama", META, rows, [Skip(other, "a", "failed")])
    kept = read_mergeable(tmp_path, "llama", META | {"date": "tomorrow"})
    new = [Row(old, "a", "loop_ms", 5.0), Row(other, "a", "loop_ms", 6.0)]
    path = write_results(tmp_path, "llama", META, new, [], kept=kept)
    assert written(path) == {(24, "b", "loop_ms"): 2.0, (24, "a", "loop_ms"): 5.0, (99, "a", "loop_ms"): 6.0}
    assert json.loads(path.read_text())["skips"] == []


@pytest.mark.parametrize("name", ["gpu", "torch", "triton", "transformers", "commit"])
def test_runs_of_another_kind_are_not_merged(tmp_path, name):
    write_results(tmp_path, "llama", META, [Row(DECODE, "a", "loop_ms", 1.0)], [])
    assert read_mergeable(tmp_path, "llama", META) is not None
    assert read_mergeable(tmp_path, "llama", META | {name: "Some other"}) is None


@pytest.mark.parametrize("commit", [None, "abc-dirty"])
def test_runs_of_an_uncertain_commit_are_not_merged(tmp_path, commit):
    meta = META | {"commit": commit}
    write_results(tmp_path, "llama", meta, [Row(DECODE, "a", "loop_ms", 1.0)], [])
    assert read_mergeable(tmp_path, "llama", meta) is None


def test_merging_keeps_the_order_of_runs():
    def row(impl, value):
        return Row(DECODE, impl, "loop_ms", value).to_json()

    merged = merge({"rows": [row("a", 1), row("b", 2)], "skips": []}, {"rows": [row("a", 3)], "skips": []})
    assert [(item["impl"], item["value"]) for item in merged["rows"]] == [("b", 2), ("a", 3)]


def test_tables():
    figures = {("floor", "loop_ms"): 4.0, ("a", "loop_ms"): 5.0, ("a", "step_ms"): 6.0, ("a", "peak_gib"): 123.4}
    rows = [Row(DECODE, impl, metric, value) for (impl, metric), value in figures.items()]
    table = render_decode([DECODE], ["a", "absent"], rows)
    lines = list(zip(*(column.cells for column in table.columns), strict=True))
    assert lines == [
        ("3 x 24", "floor", "4.00", "1.00", "-", "-"),
        ("3 x 24", "a", "5.00", "1.25", "6.00", "123"),
    ]
    prefill = [Row(PREFILL, "a", "prefill_ms", 7.0)]
    table = render_columns("Prefill", [PREFILL], ["absent", "a"], prefill, metrics=["prefill_ms"])
    assert [column.header for column in table.columns] == ["B x S", "metric", "a"]
    assert [list(column.cells) for column in table.columns] == [["1 x 24"], ["prefill_ms"], ["7.00"]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--implementations", "hf_eager,fast"], "got 'fast'"),
        (["--lengths", "512,x"], "positive integers"),
        (["--batches", "0"], "positive integers"),
        (["--lengths", "", "--prefill-lengths", "", "--skip-compile-time"], "something to measure"),
    ],
)
def test_wrong_options(arguments, message):
    finished = CliRunner().invoke(_app(), arguments, env={"COLUMNS": "200"})
    assert finished.exit_code == 2
    assert message in finished.output


def _app():
    app = typer.Typer()
    app.command()(llama.main)
    return app


@pytest.fixture
def some_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(name="Some GPU"))
    monkeypatch.setattr(llama, "CudaGauge", FakeGauge)
    monkeypatch.setattr(llama, "measure_ceilings", lambda repeats: CEILINGS)


@pytest.mark.parametrize(("failing", "status"), [("hf_eager", 0), ("flashcore_eager", 1)])
def test_command(some_gpu, monkeypatch, tmp_path, models, failing, status):
    """The command around the measurements, which are made up, in two runs of one commit."""
    measured = []

    def measure_nothing(case, models, implementations, **options):
        measured.append((case.batch, case.length, case.capacity))
        assert options["effort"].rounds == 2
        timed = [item.name for item in implementations if item.name != failing]
        metric = "loop_ms" if case.kind == "decode" else "prefill_ms"
        rows = [Row(case, name, metric, 7.25) for name in timed]
        return Results(rows, [Skip(case, failing, "failed: [odd] text")])

    first_tokens = Results([Row(compile_case("tiny", 2), "flashcore_eager", "cold_ms", 1234.0)])
    monkeypatch.setattr(llama, "make_models", lambda *_: models)
    monkeypatch.setattr(llama, "measure_case", measure_nothing)
    monkeypatch.setattr(llama, "measure_first_tokens", lambda *_, **__: first_tokens)
    common = ["--quick", "--output", str(tmp_path), "--commit", "abc", "--implementations", "hf_eager,flashcore_eager"]
    finished = CliRunner().invoke(_app(), common)
    assert finished.exit_code == status, finished.output
    assert measured == [(1, 512, 576), (1, 2048, 2112), (1, 2048, 8192), (1, 512, 576), (1, 2048, 2112)]
    assert (
        f"skipped {failing}, failed: [odd] text (decode 1 x 512, decode 1 x 2048, decode 1 x 2048 in" in finished.output
    )
    assert "7.25" in finished.output
    assert "1234" in finished.output
    path = tmp_path / "some-gpu" / "llama-quick.json"
    assert len(json.loads(path.read_text())["rows"]) == 6
    CliRunner().invoke(_app(), [*common, "--lengths", "64", "--prefill-lengths", "", "--skip-compile-time"])
    assert measured[5:] == [(1, 64, 128)]
    assert len(json.loads(path.read_text())["rows"]) == 7
    # They are those of another model.
    assert "marks:" not in finished.output


def test_marks_are_judged(some_gpu, monkeypatch, tmp_path, models):
    first_tokens = Results([Row(FIRST_TOKEN, "flashcore_loop", "cold_ms", 1234.0)])
    monkeypatch.setattr(llama, "make_models", lambda *_: replace(models, name=LLAMA_3_1_8B))
    monkeypatch.setattr(llama, "measure_first_tokens", lambda *_, **__: first_tokens)
    finished = CliRunner().invoke(_app(), ["--lengths", "", "--prefill-lengths", "", "--output", str(tmp_path)])
    assert finished.exit_code == 0, finished.output
    assert "first token, cold: ms" in finished.output
    assert f"marks: 1 yes, 0 NO, {len(MARKS) - 1} open" in finished.output


def test_first_tokens_come_from_fresh_processes_with_fresh_caches(monkeypatch, tmp_path):
    runs = []

    def run(command, env, **_):
        runs.append((command[3:], env["TORCHINDUCTOR_CACHE_DIR"], env["TRITON_CACHE_DIR"]))
        if "flashcore_loop" in command:
            raise subprocess.CalledProcessError(1, command, stderr="Traceback\nRuntimeError: no\n")
        return SimpleNamespace(stdout=f"noise\n{1000.0 * len(runs)}\n")

    monkeypatch.setattr(fresh_process.subprocess, "run", run)
    case = compile_case("tiny", layers=2)
    results = first_token.measure_first_tokens([EAGER, COMPILED, LOOP], case, model=tmp_path, layers=2)
    assert [(row.metric, row.value) for row in results.rows] == [("cold_ms", 1000.0), ("warm_ms", 2000.0)]
    assert results.skips == [Skip(case, "flashcore_loop", "failed: RuntimeError: no")]
    assert [run[0][0] for run in runs] == ["flashcore_compiled", "flashcore_compiled", "flashcore_loop"]
    assert runs[0] == runs[1]
    assert runs[0][1:] != runs[2][1:]
    assert runs[0][0][1:] == ["--model", str(tmp_path), "--layers", "2"]


def test_first_token_is_timed_to_its_end(models, compiled):
    case = replace(compile_case("tiny", layers=2), length=30, capacity=64)
    gauge = FakeGauge()
    assert first_token.first_token_ms(COMPILED, models, case, gauge) == pytest.approx(5)
    assert len(gauge.readings) == 3
