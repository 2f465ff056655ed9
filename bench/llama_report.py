"""Results of bench.llama as tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from bench.llama_cases import LlamaCase
from bench.results import Row

Values = dict[tuple[object, str, str], float]


def render_decode(cases: Sequence[LlamaCase], names: Sequence[str], rows: Sequence[Row]) -> Table:
    """One line for each case and each implementation that has figures, the floor first.

    Example:
        >>> case = LlamaCase("decode", "tiny", layers=2, batch=1, length=512, capacity=576)
        >>> rows = [Row(case, impl, "loop_ms", value) for impl, value in [("floor", 4.0), ("peer", 5.0)]]
        >>> table = render_decode([case], ["peer"], rows)
        >>> [list(column.cells) for column in table.columns][1:4]
        [['floor', 'peer'], ['4.00', '5.00'], ['1.00', '1.25']]
    """
    values = _values(rows)
    table = Table(title="Decode, ms a token", title_justify="left")
    table.add_column("B x S")
    table.add_column("implementation")
    for heading in ("loop", "x floor", "step", "peak GiB"):
        table.add_column(heading, justify="right")
    for case in cases:
        floor = values.get((case, "floor", "loop_ms"))
        for name in ("floor", *names):
            loop = values.get((case, name, "loop_ms"))
            if loop is None:
                continue
            ratio = None if floor is None else loop / floor
            step, peak = values.get((case, name, "step_ms")), values.get((case, name, "peak_gib"))
            table.add_row(case.shape, name, *map(_figure, (loop, ratio, step, peak)))
        table.add_section()
    return table


def render_columns(
    title: str, cases: Sequence[LlamaCase], names: Sequence[str], rows: Sequence[Row], metrics: Sequence[str]
) -> Table:
    """One line for each case and metric, one column for each implementation that has figures."""
    values = _values(rows)
    keys = [(case, metric) for case in cases for metric in metrics]
    shown = [name for name in names if any((case, name, metric) in values for case, metric in keys)]
    table = Table(title=title, title_justify="left")
    table.add_column("B x S")
    table.add_column("metric")
    for name in shown:
        table.add_column(name, justify="right")
    for case, metric in keys:
        table.add_row(case.shape, metric, *(_figure(values.get((case, name, metric))) for name in shown))
    return table


def _values(rows: Sequence[Row]) -> Values:
    return {(row.case, row.impl, row.metric): row.value for row in rows}


def _figure(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if value < 100 else f"{value:.0f}"
