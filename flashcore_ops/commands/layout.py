"""Sentences and tables as the commands show them: set in by two, for a terminal or a pipe."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text


def lines(texts: Iterable[str], style: str = "") -> list[Padding]:
    """Sentences, folded at words."""
    return [inset(Text(text, style=style)) for text in texts]


def inset(content: RenderableType, above: int = 0) -> Padding:
    """Sets in by two, below so many empty lines, without spaces at the ends of lines."""
    return Padding(content, (above, 0, 0, 2), expand=False)


def table(rows: Sequence[tuple[str, ...]]) -> Table:
    """Rows of plain text in aligned columns."""
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column()
    for row in rows:
        grid.add_row("", *row)
    return grid
