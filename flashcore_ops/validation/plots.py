"""The report's plots, as SVG that takes its ink from the page around it and so suits light and dark themes."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from flashcore_ops.errors import MissingDependencyError
from flashcore_ops.validation.baseline import FLASHCORE, Latency

# No colour of a line; replaced by the page's own.
_INK = "#010203"
# Beyond, a line at the bottom of a linear axis cannot be read.
_WIDE_SPREAD = 5
# Distinct in both themes, and to the colour-blind (Okabe and Ito).
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")


def check_matplotlib() -> None:
    """Raises MissingDependencyError where there is no matplotlib, before hours have gone into measuring."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError.explain(
            "flashcore validate",
            expected="matplotlib, for the report's plots",
            got=str(error),
            fix="Install it, alone or by flashcore's extra `bench`.",
        ) from error


def plot_latencies(latencies: Sequence[Latency]) -> str:
    """Milliseconds a token against length, a line for each implementation."""
    series: dict[str, dict[int, float]] = {}
    for latency in latencies:
        series.setdefault(latency.impl, {})[latency.length] = latency.ms
    return plot_lines(series, y_label="decode latency (ms a token)", is_logarithmic=_spread(series) > _WIDE_SPREAD)


def plot_speedups(latencies: Sequence[Latency]) -> str:
    """How many times as long each other implementation takes as FlashCore, against length."""
    ours = {latency.length: latency.ms for latency in latencies if latency.impl == FLASHCORE}
    series: dict[str, dict[int, float]] = {}
    for latency in latencies:
        if latency.impl != FLASHCORE:
            series.setdefault(f"over {latency.impl}", {})[latency.length] = latency.ms / ours[latency.length]
    # In the colours that they have beside FlashCore.
    return plot_lines(series, y_label="speedup (times)", first_color=1)


def plot_memory(bytes_by_length: Mapping[str, Mapping[int, float]]) -> str:
    """Gigabytes of KV cache against length, a line for each number of heads; both axes logarithmic."""
    series = {
        name: {length: num_bytes / 1e9 for length, num_bytes in line.items()} for name, line in bytes_by_length.items()
    }
    return plot_lines(series, y_label="KV cache (GB a sequence)", is_logarithmic=True)


def _spread(series: Mapping[str, Mapping[int, float]]) -> float:
    """The largest value over the smallest."""
    values = [value for line in series.values() for value in line.values()]
    return max(values) / min(values)


def _short(length: int) -> str:
    """A length as an axis has room for it.

    Example:
        >>> [_short(length) for length in (512, 1024, 131072)]
        ['512', '1k', '128k']
    """
    return f"{length // 1024}k" if length % 1024 == 0 else str(length)


def plot_lines(
    series: Mapping[str, Mapping[int, float]],
    y_label: str,
    *,
    x_label: str = "tokens in the cache",
    is_logarithmic: bool = False,
    first_color: int = 0,
) -> str:
    """Lines over lengths as one SVG element, in the colour of the text around it.

    Example:
        >>> svg = plot_lines({"a": {512: 1.0, 1024: 1.5}}, y_label="time (ms)")
        >>> svg.startswith("<svg"), "time (ms)" in svg, "currentColor" in svg
        (True, True, True)
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    style: dict[str, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": "flashcore",
        "font.size": 12,
        **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK),
    }
    with rc_context(style):
        figure = Figure(figsize=(6.4, 4.0), layout="constrained")
        axes = figure.subplots()
        for (name, line), color in zip(series.items(), _COLORS[first_color:], strict=False):
            axes.plot(list(line), list(line.values()), marker="o", color=color, label=name)
        lengths = sorted({length for line in series.values() for length in line})
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, list(map(_short, lengths)))
        axes.minorticks_off()
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        if is_logarithmic:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:,g}")
            if _spread(series) < 10 * _WIDE_SPREAD:
                # Few powers of ten, or none, lie among so few values.
                axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        else:
            axes.set_ylim(bottom=0)
        axes.grid(alpha=0.25, color=_INK)
        axes.spines[["top", "right"]].set_visible(False)
        # Above the axes: a line may pass anywhere inside them.
        figure.legend(loc="outside upper left", ncols=2, frameon=False)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    _, _, body = buffer.getvalue().partition("<svg")
    return "<svg" + body.replace(_INK, "currentColor").rstrip()
