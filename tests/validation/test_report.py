"""The report's three files, and the baseline that they plot."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from flashcore_ops.validation.baseline import FLASHCORE, SDPA_COMPILED, SDPA_EAGER, Latency, judge, measure_latencies
from flashcore_ops.validation.plots import plot_lines
from flashcore_ops.validation.report import Report, write_report
from flashcore_ops.validation.scenarios import Result
from tests.validation.subjects import make_subject

LATENCIES = [
    Latency(impl, length, ms * length / 512)
    for length in (512, 2048)
    for impl, ms in ((FLASHCORE, 1.0), (SDPA_EAGER, 3.0), (SDPA_COMPILED, 2.0))
]
RESULTS = [
    Result("next token", True, "4 of 4 equal", figures={"tokens": 4, "ms_per_token": None}),
    Result("50 tokens", False, "first difference at index 3", text='He said: "<b>5 > 3</b>"\nand left.', seconds=1.25),
]


def a_report(latencies: list[Latency] = LATENCIES) -> Report:
    cache_bytes = {"GQA, 2 heads": {512: 1e6, 1024: 2e6}, "MHA, 4 heads": {512: 2e6, 1024: 4e6}}
    return Report({"model": "tiny", "device": "CPU"}, RESULTS, latencies, cache_bytes)


def test_json_holds_every_figure(tmp_path: Path) -> None:
    path, _, _ = write_report(a_report(), tmp_path / "new" / "folder")
    found = json.loads(path.read_text())
    assert found["passed"] is False
    assert found["results"][1] == {
        "name": "50 tokens",
        "passed": False,
        "evidence": "first difference at index 3",
        "text": 'He said: "<b>5 > 3</b>"\nand left.',
        "figures": {},
        "seconds": 1.25,
    }
    assert {"impl": SDPA_EAGER, "length": 2048, "ms": 12.0} in found["latencies"]


def test_markdown_has_both_tables(tmp_path: Path) -> None:
    _, path, _ = write_report(a_report(), tmp_path)
    text = path.read_text()
    assert "**1 of 2 scenarios passed.**" in text
    assert "| 50 tokens | fail | first difference at index 3 | 1.2 |" in text
    assert "| 2048 | 4.00 | 12.00 | 8.00 |" in text
    assert "> and left." in text


def test_html_stands_alone_and_escapes_what_models_write(tmp_path: Path) -> None:
    *_, path = write_report(a_report(), tmp_path)
    text = path.read_text()
    assert "<b>5" not in text
    assert "&lt;b&gt;5 &gt; 3&lt;/b&gt;" in text
    assert text.count("<svg") == 3
    for outside in ("src=", "@import", "<link", "<script"):
        assert outside not in text
    assert "prefers-color-scheme: dark" in text


def test_without_a_baseline_only_memory_is_plotted(tmp_path: Path) -> None:
    *_, path = write_report(a_report(latencies=[]), tmp_path)
    assert path.read_text().count("<svg") == 1


def test_plots_are_labelled_and_take_the_pages_ink() -> None:
    svg = plot_lines({"one": {512: 1.0, 2048: 2.0}, "two": {512: 3.0}}, y_label="time (ms)")
    ElementTree.fromstring(svg)
    for label in ("one", "two", "tokens in the cache", "time (ms)", "2k"):
        assert f">{label}<" in svg
    assert "currentColor" in svg
    assert "#000000" not in svg


@torch.no_grad()
def test_latencies_are_measured(device: str) -> None:
    latencies = list(measure_latencies(make_subject(device=device), lengths=(8, 40)))
    impls = {FLASHCORE, SDPA_EAGER} | ({SDPA_COMPILED} if device == "cuda" else set())
    assert {(latency.impl, latency.length) for latency in latencies} == {(i, n) for i in impls for n in (8, 40)}
    assert all(latency.ms > 0 for latency in latencies)


@pytest.mark.parametrize(("ms", "passed"), [(9.9, True), (10.1, False)])
def test_the_mark_is_10_ms_at_2048(ms: float, passed: bool) -> None:
    result = judge([Latency(FLASHCORE, 2048, ms), Latency(SDPA_EAGER, 2048, 30.0), Latency(FLASHCORE, 4096, 99.0)])
    assert (result.passed, result.evidence) == (passed, f"{ms:.2f} ms; sdpa, eager 30.00")
    assert not judge([Latency(FLASHCORE, 512, 1.0)]).passed
