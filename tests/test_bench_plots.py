"""README's plots: the lines that they draw, and a file for each theme of every one that README shows."""

from __future__ import annotations

import json
import re
from pathlib import Path

from bench.plots import PLOTS, lines_of, write_plots
from bench.readme import README, render
from bench.results import DIRECTORY


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
