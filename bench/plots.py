"""README's plots, drawn from the results files: a light and a dark file for each."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.case_groups import DECODE, PREFILL, is_among
from flashcore_ops.validation.plots import plot_lines

INKS = {"light": "#1f2328", "dark": "#e6edf3"}
LABELS = {
    "floor": "floor",
    "flashcore": "FlashCore",
    "flashcore_portable": "FlashCore, portable",
    "sdpa_cudnn": "SDPA cuDNN",
    "sdpa_flash": "SDPA flash",
    "sdpa_efficient": "SDPA efficient",
    "sdpa_cudnn_packed": "SDPA cuDNN, packed",
    "sdpa_flash_packed": "SDPA flash, packed",
    "flex": "FlexAttention",
    "hf_static_cache": "Hugging Face, static cache",
    "flashinfer_paged": "FlashInfer",
    "flashinfer_fa3": "FlashInfer, FA3",
    "flashcore_loop": "FlashCore's loop",
    "flashcore_compiled": "FlashCore, compiled",
    "flashcore_eager": "FlashCore, eager",
    "hf_compiled": "Hugging Face, compiled",
    "hf_eager": "Hugging Face, eager",
}
Json = Mapping[str, Any]


def labels_of(*impls: str) -> dict[str, str]:
    """What readers call some implementations.

    Example:
        >>> labels_of("flex")
        {'flex': 'FlexAttention'}
    """
    return {impl: LABELS[impl] for impl in impls}


@dataclass(frozen=True)
class Plot:
    """Which figures of a results file make a plot.

    takes: whether a case is in it.
    impls: the lines, each with its label, as far as they have two figures or more; six at most, as many as there are
        colours.
    """

    bench: str
    name: str
    title: str
    y_label: str
    metric: str
    takes: Callable[[Json], bool]
    impls: Mapping[str, str]
    is_logarithmic: bool = False


DECODE_IMPLS = labels_of("flashcore", "sdpa_cudnn", "sdpa_flash", "flashinfer_paged", "hf_static_cache", "floor")
BATCH_1 = is_among([case for case in DECODE if case.batch == 1])
PLOTS = (
    Plot(
        bench="llama",
        name="llama-decode",
        title="Decode of LLaMA-3.1-8B, batch 1",
        y_label="decode (ms a token)",
        metric="loop_ms",
        takes=lambda case: case["kind"] == "decode" and case["B"] == 1,
        impls=labels_of("flashcore_loop", "flashcore_compiled", "hf_compiled", "hf_eager", "floor"),
    ),
    Plot(
        bench="attention",
        name="attention-decode",
        title="Decode attention, batch 1",
        y_label="decode attention (us)",
        metric="us",
        takes=BATCH_1,
        impls=DECODE_IMPLS,
        is_logarithmic=True,
    ),
    Plot(
        bench="attention",
        name="attention-bandwidth",
        title="Achieved bandwidth of decode attention, batch 1",
        y_label="decode attention (TB/s)",
        metric="tbs",
        takes=BATCH_1,
        impls=DECODE_IMPLS | {"floor": "the GPU's read rate"},
    ),
    Plot(
        bench="attention",
        name="attention-prefill",
        title="Causal prefill attention, 16k tokens in all",
        y_label="prefill attention (TFLOP/s)",
        metric="tflops",
        takes=is_among(PREFILL),
        impls=labels_of("flashcore", "flashcore_portable", "sdpa_cudnn", "sdpa_flash", "flex", "flashinfer_fa3"),
    ),
)


def lines_of(plot: Plot, rows: Iterable[Json]) -> dict[str, dict[int, float]]:
    """Figures by label and length. Where a case was timed with several capacities, the first counts."""
    lines: dict[str, dict[int, float]] = {label: {} for label in plot.impls.values()}
    for row in rows:
        case, label = row["case"], plot.impls.get(row["impl"])
        if label and row["metric"] == plot.metric and plot.takes(case):
            lines[label].setdefault(case["S"], row["value"])
    return {label: dict(sorted(line.items())) for label, line in lines.items() if len(line) > 1}


def write_plots(directory: Path) -> None:
    """Draws every plot that has figures, of each GPU in a directory of results."""
    for folder in sorted(path for path in directory.iterdir() if path.is_dir()):
        write_plots_of(folder)


def write_plots_of(folder: Path) -> list[Path]:
    """Draws every plot that has figures among one GPU's results into its `plots`, and gives the files."""
    written = []
    for plot in PLOTS:
        path = folder / f"{plot.bench}.json"
        lines = lines_of(plot, json.loads(path.read_text())["rows"]) if path.is_file() else {}
        if not lines:
            continue
        svg = plot_lines(lines, plot.y_label, x_label="length (tokens)", is_logarithmic=plot.is_logarithmic)
        (folder / "plots").mkdir(exist_ok=True)
        for theme, ink in INKS.items():
            written.append(folder / "plots" / f"{plot.name}-{theme}.svg")
            written[-1].write_text(svg.replace("currentColor", ink) + "\n")
    return written


def markdown_of(plot: Plot, gpu: str) -> str:
    """A picture in both themes, under its title."""
    base = f"bench/results/{gpu}/plots/{plot.name}"
    return f"""**{plot.title}**

<picture>
<source media="(prefers-color-scheme: dark)" srcset="{base}-dark.svg">
<img alt="{plot.title}" src="{base}-light.svg">
</picture>"""
