"""Results as text for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from bench.cases import Case
from bench.results import Row, Skip


def render_table(title: str, cases: Sequence[Case], names: Sequence[str], rows: Sequence[Row], metric: str) -> Table:
    """One line a case, one column an implementation.

    Args:
        names: implementations; the first is compared with the best of the others. Those without figures get no column.
        metric: "us", where less is better and the floor has a column, or "tflops", where more is.
    """
    values = {(row.case, row.impl): row.value for row in rows if row.metric == metric}
    shown = [name for name in ("floor", *names) if any((case, name) in values for case in cases)]
    table = Table(title=title, title_justify="left")
    for heading in ("B x S", *shown, "speed / best peer"):
        table.add_column(heading, justify="right")
    for case in cases:
        figures = [values.get((case, name)) for name in shown]
        ratio = speed_ratio(values.get((case, names[0])), [values.get((case, name)) for name in names[1:]], metric)
        table.add_row(
            f"{case.batch} x {case.kv_len}",
            *("-" if figure is None else _figure(figure) for figure in figures),
            "-" if ratio is None else f"{ratio:.2f}",
        )
    return table


def speed_ratio(ours: float | None, peers: Sequence[float | None], metric: str) -> float | None:
    """Speed over the best peer's, above 1 where ours is faster; None without a figure on both sides.

    Example:
        >>> speed_ratio(8.0, [10.0, None, 12.0], "us"), speed_ratio(300.0, [600.0, 400.0], "tflops")
        (1.25, 0.5)
    """
    present = [peer for peer in peers if peer is not None]
    if ours is None or not present:
        return None
    return min(present) / ours if metric == "us" else ours / max(present)


def render_skips(skips: Sequence[Skip]) -> list[str]:
    """One line for each implementation and reason, with the cases it holds for.

    Example:
        >>> cases = Case(batch=1, query_len=1, kv_len=512), Case(batch=8, query_len=1, kv_len=512)
        >>> render_skips([Skip(case, "peer", "cannot run: no GPU") for case in cases])
        ['skipped peer, cannot run: no GPU (decode 1 x 512, decode 8 x 512)']
    """
    cases: dict[tuple[str, str], list[str]] = {}
    for skip in skips:
        cases.setdefault((skip.impl, skip.reason), []).append(str(skip.case))
    return [f"skipped {impl}, {reason} ({', '.join(held)})" for (impl, reason), held in cases.items()]


def _figure(value: float) -> str:
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"
