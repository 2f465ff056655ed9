"""`flashcore models`: the table of families that can be patched."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from flashcore_ops.integrations.families import FAMILY_COLUMNS, TESTED_TRANSFORMERS, family_rows


def render_models() -> RenderableType:
    """The families, what their attention uses, what decodes them, and what all that was tested with."""
    grid = Table(box=None, pad_edge=False)
    for name in FAMILY_COLUMNS:
        grid.add_column(name, header_style="dim")
    for row in family_rows():
        grid.add_row(*row)
    return Group(grid, Text(f"\nTested with transformers {TESTED_TRANSFORMERS}.", style="dim"))
