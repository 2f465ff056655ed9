"""What `flashcore check` found, as tables for a terminal or a pipe."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from flashcore_ops.checks import dtype_name
from flashcore_ops.commands.check import CheckReport, LayerGroup
from flashcore_ops.commands.kernels import kernel_rows
from flashcore_ops.commands.layout import inset, lines, table

LAYER_COLUMNS = ("layers", "heads:KV heads", "head dim", "scale", "window", "softcap", "sinks")


def render_check(report: CheckReport) -> RenderableType:
    """Whether the model is served, its layers and their kernels, and how it generates; or why it is not served."""
    title = Text(report.model, style="bold")
    if report.refusal is not None:
        return Group(title, *lines([f"not served: {subject(report)}", report.refusal]))
    return Group(
        title,
        *lines([f"served: {subject(report)}, in {dtype_name(report.dtype)}"]),
        *(part for group in report.groups for part in group_parts(group)),
        *generation_parts(report),
    )


def subject(report: CheckReport) -> str:
    """The model's family and class."""
    return report.class_name if report.family is None else f"{report.family.name} ({report.class_name})"


def group_parts(group: LayerGroup) -> tuple[RenderableType, ...]:
    """The tables of some layers and of the kernels that serve them."""
    heading = Text("\nAttention", style="bold")
    return heading, inset(layer_table(group)), Text("\nKernels", style="bold"), table(kernel_rows(group.kernels))


def layer_table(group: LayerGroup) -> Table:
    """A row for each kind of layer."""
    grid = Table(box=None, pad_edge=False)
    for name in LAYER_COLUMNS:
        grid.add_column(name, justify="right", header_style="dim")
    for layer, number in group.layers:
        grid.add_row(
            str(number),
            f"{layer.num_query_heads}:{layer.num_kv_heads}",
            str(layer.head_dim),
            f"{layer.scale:.4g}",
            f"{layer.window:,}" if layer.window else "none",
            f"{layer.softcap:g}" if layer.softcap else "none",
            "yes" if layer.has_sinks else "none",
        )
    return grid


def generation_parts(report: CheckReport) -> list[RenderableType]:
    """What caches and steps `generate` runs on; nothing for a model that attends in both directions."""
    if not all(layer.is_causal for group in report.groups for layer, _ in group.layers):
        return []
    if report.obstacle is not None:
        texts = [f"Hugging Face's own caches and steps: {report.obstacle}"]
    else:
        texts = ["on a GPU a kept static cache and a captured step, on the CPU Hugging Face's own"]
    if report.obstacle is None and report.is_quantized:
        texts.append("The checkpoint is quantized: with its own layers, a GPU may stay Hugging Face's too.")
    return [Text("\ngenerate", style="bold"), *lines(texts)]
