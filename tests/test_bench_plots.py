"""README's plots: the lines that they draw, and a file for each theme of every one that README shows."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from bench.case_groups import GROUPS
from bench.cases import Case
from bench.peers import IMPLEMENTATIONS
from bench.plots import PLOTS, lines_of, write_plots
from bench.readme import README, render
from bench.results import DIRECTORY, Row
from flashcore_ops.validation.plots import plot_lines


def row(impl: str, length: int, value: float, capacity: int = 0, **case: object) -> dict[str, object]:
    shape = {"kind": "decode", "model": "m", "layers": 2, "B": 1, "S": length, "capacity": capacity or length + 64}
    return {"case": shape | case, "impl": impl, "metric": "loop_ms", "value": value}


ROWS = [
    row("flashcore_loop", 2048, 2.0),
    row("flashcore_loop", 512, 1.0),
    row("flashcore_loop", 2048, 9.0, capacity=8192),
    row("flashcore_loop", 2048, 7.0, B=8),
    row("floor", 512, 0.5),
    row("floor", 2048, 0.75),
    row("hf_eager", 2048, 30.0),
    row("unknown", 512, 1.0),
]


def test_lines_are_sorted_and_a_single_figure_is_no_line() -> None:
    assert lines_of(PLOTS[0], ROWS) == {"FlashCore's loop": {512: 1.0, 2048: 2.0}, "floor": {512: 0.5, 2048: 0.75}}


def attention_row(case: Case, impl: str, metric: str, value: float) -> dict[str, Any]:
    return Row(case, impl, metric, value).to_json()


def test_attention_plots_are_of_the_tables_cases_alone() -> None:
    cases = [case for group in GROUPS.values() for case in group]
    metrics = ("us", "tbs", "tflops")
    rows = [attention_row(case, "flashcore", metric, 1.0) for case in cases for metric in metrics]
    lengths = {plot.name: list(lines_of(plot, rows)["FlashCore"]) for plot in PLOTS if plot.bench == "attention"}
    decode = [512, 2048, 8192, 32768, 131072]
    assert lengths == {
        "attention-decode": decode,
        "attention-bandwidth": decode,
        "attention-prefill": [512, 1024, 2048, 4096, 8192, 16384, 32768],
    }


def test_every_line_has_a_colour_of_its_own() -> None:
    names = {item.name for item in IMPLEMENTATIONS} | {"floor"}
    for plot in PLOTS:
        lines = {label: {512: 1.0, 1024: float(height)} for height, label in enumerate(plot.impls.values())}
        svg = plot_lines(lines, y_label="us")
        assert all(f">{label}<" in svg for label in lines), plot.name
        assert plot.bench != "attention" or set(plot.impls) <= names


def test_each_theme_has_its_ink(tmp_path: Path) -> None:
    (tmp_path / "gpu").mkdir()
    (tmp_path / "gpu" / "llama.json").write_text(json.dumps({"meta": {}, "rows": ROWS}))
    write_plots(tmp_path)
    plots = tmp_path / "gpu" / "plots"
    light, dark = ((plots / f"llama-decode-{theme}.svg").read_text() for theme in ("light", "dark"))
    assert light != dark
    for svg in (light, dark):
        assert "currentColor" not in svg
        assert ">decode (ms a token)<" in svg
    assert len(list(plots.iterdir())) == 2


def test_readme_shows_plots_that_are_there() -> None:
    shown = re.findall(r'(?:srcset|src)="([^"]+)"', render(DIRECTORY))
    assert shown
    for path in shown:
        assert path in README.read_text()
        assert (README.parent / path).is_file()
