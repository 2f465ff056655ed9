"""What `flashcore memory` found, as tables for a terminal or a pipe."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from flashcore_ops.commands.layout import inset, lines
from flashcore_ops.commands.memory import MemoryReport
from flashcore_ops.kv_memory import KVShape, format_bytes

# Columns of a table: each with its dtype and its heads.
Columns = dict[str, tuple[torch.dtype, KVShape]]
DTYPES = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}


def render_memory(report: MemoryReport) -> RenderableType:
    """The report: the shape, the cache's bytes, what fits, and what the figures stand for."""
    return Group(
        Text(report.model, style="bold"),
        *lines([shape_line(report)]),
        Text("\nKV cache", style="bold"),
        *lines([token_line(report.shape)]),
        cache_table(report),
        Text(f"\nWhat fits into {format_bytes(report.gpu.num_bytes)} ({report.gpu.source})", style="bold"),
        *lines([room_line(report)]),
        *fit_tables(report),
        Text(),
        *lines(notes(report), style="dim"),
    )


def shape_line(report: MemoryReport) -> str:
    """The model in numbers."""
    shape = report.shape
    heads = f"{shape.num_query_heads} query and {shape.num_kv_heads} KV heads"
    return f"{shape.num_layers} layers, {heads}, head dim {shape.head_dim}, made for {report.max_length:,} positions"


def token_line(shape: KVShape) -> str:
    """The arithmetic of one token.

    Example:
        >>> token_line(KVShape(num_layers=32, num_query_heads=32, num_kv_heads=8, head_dim=128))
        '2 x 32 layers x 8 KV heads x 128 x 2 bytes = 131,072 bytes a token in bf16'
    """
    dtype = DTYPES["bf16"]
    factors = f"{shape.num_layers} layers x {shape.num_kv_heads} KV heads x {shape.head_dim} x {dtype.itemsize} bytes"
    return f"2 x {factors} = {shape.token_bytes(dtype):,} bytes a token in bf16"


def columns(shape: KVShape) -> Columns:
    """The model's own heads beside MHA, in each dtype; a model that has MHA stands alone.

    Example:
        >>> list(columns(KVShape(num_layers=32, num_query_heads=32, num_kv_heads=8, head_dim=128)))
        ['bf16 GQA', 'bf16 MHA', 'fp8 GQA', 'fp8 MHA']
    """
    kinds = {attention_kind(heads): heads for heads in (shape, shape.as_mha())}
    return {f"{name} {kind}": (dtype, heads) for name, dtype in DTYPES.items() for kind, heads in kinds.items()}


def attention_kind(shape: KVShape) -> str:
    """MHA, GQA or MQA."""
    if shape.num_kv_heads == shape.num_query_heads:
        return "MHA"
    return "MQA" if shape.num_kv_heads == 1 else "GQA"


def cache_table(report: MemoryReport) -> Padding:
    """Bytes of a cache by batch and length."""
    shown = columns(report.shape)
    rows = [
        (
            f"{batch:,}",
            f"{length:,}",
            *(format_bytes(shape.cache_bytes(batch, length, dtype)) for dtype, shape in shown.values()),
        )
        for batch in report.batches
        for length in report.lengths
    ]
    return table(("batch", "length", *shown), rows, group=len(report.lengths))


def room_line(report: MemoryReport) -> str:
    """What the GPU's memory is used for."""
    weights = f"{format_bytes(report.weights)} of weights ({report.weights_source})"
    parts = f"{weights} and {format_bytes(report.reserve)} in reserve"
    if not report.room:
        return f"Nothing: {parts} leave no room for a KV cache."
    return f"{parts} leave {format_bytes(report.room)} for the KV cache"


def fit_tables(report: MemoryReport) -> list[Padding]:
    """The largest batch at each length and the largest length at each batch, where there is room for any."""
    if not report.room:
        return []
    shown = columns(report.shape)
    batches = [
        (
            f"{length:,}",
            *(count(shape.largest_batch(report.room, length, dtype)) for dtype, shape in shown.values()),
        )
        for length in report.lengths
    ]
    lengths = [
        (
            f"{batch:,}",
            *(count(shape.largest_length(report.room, batch, dtype)) for dtype, shape in shown.values()),
        )
        for batch in report.batches
    ]
    return [
        table(("length", *shown), batches, title="largest batch at a length"),
        table(("batch", *shown), lengths, title="largest length at a batch"),
    ]


def count(number: int) -> str:
    """A number of rows or tokens, or that there is room for none."""
    return f"{number:,}" if number else "none"


def notes(report: MemoryReport) -> list[str]:
    """What the figures stand for and leave out."""
    found = ["1 GB is 10^9 bytes."]
    if attention_kind(report.shape) != "MHA":
        found.append("MHA: the cache if each query head had keys and values of its own, beside the same weights.")
    found.append("fp8 is arithmetic: FlashCore's caches hold 16 or 32 bits an element.")
    found.append("The reserve is for activations, logits and graphs. Long prompts in one piece need more.")
    found.append("generate takes caches of 256, 512, 1024, ... slots; make_static_cache takes any length.")
    if report.window is not None:
        found.append(f"The window of {report.window:,} tokens saves nothing: static caches keep every token.")
    return found


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, title: str = "", group: int = 0) -> Padding:
    """Right-aligned columns set in by two, with an empty line between groups of so many rows."""
    grid = Table(title=title or None, title_justify="left", title_style="", box=None, pad_edge=False)
    for name in header:
        grid.add_column(name, justify="right", header_style="dim")
    for index, row in enumerate(rows):
        if group and index and index % group == 0:
            grid.add_row()
        grid.add_row(*row)
    return inset(grid, above=1)
