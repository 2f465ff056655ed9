"""README's plots, drawn from the results files: a light and a dark file for each."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashcore_ops.validation.plots import plot_lines

INKS = {"light": "#1f2328", "dark": "#e6edf3"}
Json = Mapping[str, Any]


@dataclass(frozen=True)
class Plot:
    """Which figures of a results file make a plot.

    wanted: what their cases have in common.
    impls: the lines, each with its label, as far as they have two figures or more.
    """

    bench: str
    name: str
    title: str
    y_label: str
    metric: str
    wanted: Mapping[str, Any]
    impls: Mapping[str, str]
    is_logarithmic: bool = False


ATTENTION = {
    "flashcore": "FlashCore",
    "sdpa_cudnn": "SDPA cuDNN",
    "sdpa_flash": "SDPA flash",
    "sdpa_efficient": "SDPA efficient",
    "hf_static_cache": "Hugging Face, static cache",
    "floor": "floor",
}
PLOTS = (
    Plot(
        bench="llama",
        name="llama-decode",
        title="Decode of LLaMA-3.1-8B, batch 1",
        y_label="decode (ms a token)",
        metric="loop_ms",
        wanted={"kind": "decode", "B": 1},
        impls={
            "flashcore_loop": "FlashCore's loop",
            "flashcore_compiled": "FlashCore, compiled",
            "hf_compiled": "Hugging Face, compiled",
            "hf_eager": "Hugging Face, eager",
            "floor": "floor",
        },
    ),
    Plot(
        bench="attention",
        name="attention-decode",
        title="Decode attention, batch 1",
        y_label="decode attention (us)",
        metric="us",
        wanted={"Q": 1, "B": 1},
        impls=ATTENTION,
        is_logarithmic=True,
    ),
    Plot(
        bench="attention",
        name="attention-prefill",
        title="Causal prefill attention, 16k tokens in all",
        y_label="prefill attention (TFLOP/s)",
        metric="tflops",
        wanted={},
        impls=ATTENTION,
    ),
)


def lines_of(plot: Plot, rows: Iterable[Json]) -> dict[str, dict[int, float]]:
    """Figures by label and length. Where a case was timed with several capacities, the first counts."""
    lines: dict[str, dict[int, float]] = {label: {} for label in plot.impls.values()}
    for row in rows:
        case, label = row["case"], plot.impls.get(row["impl"])
        if label and row["metric"] == plot.metric and all(case.get(key) == value for key, value in plot.wanted.items()):
            lines[label].setdefault(case["S"], row["value"])
    return {label: dict(sorted(line.items())) for label, line in lines.items() if len(line) > 1}


def write_plots(directory: Path) -> None:
    """Draws every plot that has figures into `<gpu>/plots` of a directory of results."""
    for folder in sorted(path for path in directory.iterdir() if path.is_dir()):
        for plot in PLOTS:
            path = folder / f"{plot.bench}.json"
            lines = lines_of(plot, json.loads(path.read_text())["rows"]) if path.is_file() else {}
            if not lines:
                continue
            svg = plot_lines(lines, plot.y_label, x_label="length (tokens)", is_logarithmic=plot.is_logarithmic)
            (folder / "plots").mkdir(exist_ok=True)
            for theme, ink in INKS.items():
                (folder / "plots" / f"{plot.name}-{theme}.svg").write_text(svg.replace("currentColor", ink) + "\n")


def markdown_of(plot: Plot, gpu: str) -> str:
    """A picture in both themes, under its title."""
    base = f"bench/results/{gpu}/plots/{plot.name}"
    return f"""**{plot.title}**

<picture>
<source media="(prefers-color-scheme: dark)" srcset="{base}-dark.svg">
<img alt="{plot.title}" src="{base}-light.svg">
</picture>"""
