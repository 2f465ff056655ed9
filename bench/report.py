"""Results as text for a terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rich import box
from rich.table import Table

from bench.cases import Case, HostCase
from bench.figures import Figures
from bench.marks import Mark, judge_marks
from bench.results import Skip

# Cases of a skip that are named; the others are counted.
MAX_NAMED = 3
HOST_METRICS = ("host_us", "cold_ms", "warm_ms")
HOLDS = {True: "yes", False: "NO", None: "open"}


def render_group(group: str, cases: Sequence[Case], names: Sequence[str], figures: Figures) -> list[Table]:
    """A group's decode cases in us and its prefill cases in TFLOP/s, as far as it has both.

    Args:
        names: implementations. Those without figures get no column.
    """
    kinds = {"us": [case for case in cases if case.is_decode], "tflops": [case for case in cases if not case.is_decode]}
    units = {"us": "us", "tflops": "TFLOP/s"}
    return [
        _render_cases(f"{group}: {units[metric]}", of_kind, names, figures, metric)
        for metric, of_kind in kinds.items()
        if of_kind
    ]


def _render_cases(title: str, cases: Sequence[Case], names: Sequence[str], figures: Figures, metric: str) -> Table:
    shown = [name for name in names if any(figures.get(case, name, metric) is not None for case in cases)]
    table = _empty_table(title)
    table.add_column("B x S", no_wrap=True)
    for name in (*shown, "speed_/ best_peer"):
        # A word a line, since rich gives way to long headings before it folds them.
        table.add_column(name.replace("_", "\n"), justify="right", vertical="bottom")
    for case in cases:
        values = [figures.get(case, name, metric) for name in shown]
        table.add_row(case.label, *map(_cell, (*values, figures.speedup(case))))
    return table


def render_host(cases: Sequence[HostCase], names: Sequence[str], figures: Figures) -> Table:
    """One line for each case and metric that has figures, one column an implementation."""
    table = _empty_table("The host's part")
    for heading in ("case", "metric", *names):
        table.add_column(heading)
    for case in cases:
        for metric in HOST_METRICS:
            values = [figures.get(case, name, metric) for name in names]
            if any(value is not None for value in values):
                table.add_row(str(case), metric, *map(_cell, values))
    return table


def render_marks(marks: Sequence[Mark], figures: Figures) -> list[Table | str]:
    """Each mark that has figures: its bound, the worst figure with its case, and whether it holds; and how many do.

    Marks with cases that were not measured are open unless one breaks the bound.
    """
    table = _empty_table("Marks")
    for heading in ("mark", "bound", "worst", "at", "measured", "holds"):
        table.add_column(heading)
    verdicts = judge_marks(marks, figures)
    for verdict in verdicts:
        if verdict.measured:
            worst, case = verdict.measured[0]
            measured = f"{len(verdict.measured)} of {len(verdict.mark.cases)}"
            table.add_row(verdict.mark.claim, verdict.mark.bound, figure(worst), case, measured, HOLDS[verdict.holds])
    counts = Counter(HOLDS[verdict.holds] for verdict in verdicts)
    held = ", ".join(f"{counts[word]} {word}" for word in HOLDS.values())
    return [table, f"marks: {held}"]


def render_skips(skips: Sequence[Skip]) -> list[str]:
    """One line for each implementation and reason, with the cases it holds for.

    Example:
        >>> cases = [Case(batch=batch, query_len=1, kv_len=512) for batch in (1, 8, 16, 32, 64)]
        >>> render_skips([Skip(case, "peer", "cannot run: no GPU") for case in cases])
        ['skipped peer, cannot run: no GPU (decode 1 x 512, decode 8 x 512, decode 16 x 512 and 2 more)']
    """
    cases: dict[tuple[str, str], list[str]] = {}
    for skip in skips:
        cases.setdefault((skip.impl, skip.reason), []).append(str(skip.case))
    return [f"skipped {impl}, {reason} ({_some(held)})" for (impl, reason), held in cases.items()]


def figure(value: float) -> str:
    """Three digits or more.

    Example:
        >>> figure(5.038), figure(54.321), figure(2345.6)
        ('5.04', '54.3', '2346')
    """
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _cell(value: float | None) -> str:
    return "-" if value is None else figure(value)


def _some(names: Sequence[str]) -> str:
    more = len(names) - MAX_NAMED
    return ", ".join(names[:MAX_NAMED]) + (f" and {more} more" if more > 0 else "")


def _empty_table(title: str) -> Table:
    # Narrow, so that all implementations fit into a log of 120 columns.
    style = box.SIMPLE_HEAD
    return Table(title=f"\n{title}", title_justify="left", box=style, show_edge=False, padding=(0, 1, 0, 0))
