"""A validation's report: JSON for machines, Markdown to paste, and one HTML page that needs nothing else."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flashcore_ops.validation.baseline import Latency
from flashcore_ops.validation.plots import plot_latencies, plot_memory, plot_speedups
from flashcore_ops.validation.scenarios import Result

FILES = ("report.json", "report.md", "report.html")


@dataclass(frozen=True)
class Report:
    """What was validated, where, and what came out.

    Attributes:
        meta: model, dtype, device, versions, date, as text.
        cache_bytes: bytes of one sequence's KV cache by length, "GQA" and "MHA".
    """

    meta: Mapping[str, str]
    results: Sequence[Result]
    latencies: Sequence[Latency]
    cache_bytes: Mapping[str, Mapping[int, float]]

    @property
    def passed(self) -> bool:
        return all(result.passed for result in self.results)

    def verdict(self) -> str:
        """One line.

        Example:
            >>> Report({}, [Result("next token", True, "")], [], {}).verdict()
            '1 of 1 scenarios passed'
        """
        return f"{sum(result.passed for result in self.results)} of {len(self.results)} scenarios passed"


def write_report(report: Report, directory: Path) -> list[Path]:
    """Writes the three files, and returns their paths."""
    directory.mkdir(parents=True, exist_ok=True)
    paths = [directory / name for name in FILES]
    for path, text in zip(paths, (to_json(report), to_markdown(report), to_html(report)), strict=True):
        path.write_text(text, encoding="utf-8")
    return paths


def to_json(report: Report) -> str:
    """Every figure."""
    return json.dumps(_in_json({"passed": report.passed, **asdict(report)}), indent=1, allow_nan=False) + "\n"


def to_markdown(report: Report) -> str:
    """Tables of scenarios and latencies."""
    lines = ["# FlashCore validation", "", f"**{report.verdict()}.**", ""]
    lines += [f"- {name}: {value}" for name, value in report.meta.items()]
    lines += ["", "| scenario | result | evidence | seconds |", "|---|---|---|---:|"]
    lines += [
        f"| {result.name} | {_word(result)} | {result.evidence} | {result.seconds:.1f} |" for result in report.results
    ]
    for result in report.results:
        if result.text is not None:
            lines += ["", f"What it wrote ({result.name}):", "", *[f"> {line}" for line in result.text.splitlines()]]
    if report.latencies:
        impls, rows = latency_table(report.latencies)
        lines += ["", f"| tokens in the cache | {' | '.join(f'{impl}, ms a token' for impl in impls)} |"]
        lines += ["|---:|" + "---:|" * len(impls)]
        lines += [f"| {length} | {' | '.join(cells)} |" for length, cells in rows]
    return "\n".join(lines) + "\n"


def to_html(report: Report) -> str:
    """The page, with its plots inside."""
    from jinja2 import Environment, PackageLoader

    plots = {}
    if report.latencies:
        plots["Decode latency"] = plot_latencies(report.latencies)
        if len(latency_table(report.latencies)[0]) > 1:
            plots["Speedup"] = plot_speedups(report.latencies)
    if report.cache_bytes:
        plots["KV-cache memory"] = plot_memory(report.cache_bytes)
    environment = Environment(loader=PackageLoader("flashcore_ops.validation", "."), autoescape=True)
    impls, rows = latency_table(report.latencies)
    page = environment.get_template("report.html.jinja")
    return page.render(report=report, plots=plots, impls=impls, rows=rows)


def latency_table(latencies: Sequence[Latency]) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """The implementations, and for each length their figures as text.

    Example:
        >>> latency_table([Latency("a", 512, 1.0), Latency("b", 512, 2.0), Latency("a", 1024, 3.0)])
        (['a', 'b'], [(512, ['1.00', '2.00']), (1024, ['3.00', '-'])])
    """
    impls = list(dict.fromkeys(latency.impl for latency in latencies))
    figures = {(latency.length, latency.impl): f"{latency.ms:.2f}" for latency in latencies}
    lengths = sorted({latency.length for latency in latencies})
    return impls, [(length, [figures.get((length, impl), "-") for impl in impls]) for length in lengths]


def _in_json(value: Any) -> Any:
    """JSON has no infinity and no NaN: they go there as text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _in_json(item) for key, item in value.items()}
    return [_in_json(item) for item in value] if isinstance(value, list | tuple) else value


def _word(result: Result) -> str:
    return "pass" if result.passed else "fail"
