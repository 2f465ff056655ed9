"""`python -m bench.readme`: writes README.md's tables of results, from their files, and of families, and the plots."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.case_groups import DECODE, PREFILL, is_among
from bench.figures import FLOOR
from bench.llama_cases import LlamaCase
from bench.plots import LABELS, PLOTS, lines_of, markdown_of, write_plots
from bench.report import figure
from bench.results import DIRECTORY
from flashcore_ops.integrations.families import FAMILY_COLUMNS, family_rows

README = Path(__file__).parent.parent / "README.md"
ATTENTION = (
    *("flashcore", "flashcore_portable", "sdpa_cudnn", "sdpa_flash", "sdpa_efficient", "sdpa_cudnn_packed"),
    *("sdpa_flash_packed", "flex", "flashinfer_paged", "flashinfer_fa3", "hf_static_cache"),
)
Json = Mapping[str, Any]


MODELS = ("flashcore_loop", "flashcore_compiled", "hf_compiled", "flashcore_eager", "hf_eager")


@dataclass(frozen=True)
class Table:
    """Which figures of a results file make a table.

    takes: whether a case is in it.
    metrics: each with what its lines say beside their shape.
    impls: the columns, as far as they have figures. The best of several is bold.
    """

    bench: str
    title: str
    takes: Callable[[Json], bool]
    metrics: Mapping[str, str]
    impls: Sequence[str]
    has_ratios: bool = False
    is_more_better: bool = False


def is_of_kind(kind: str) -> Callable[[Json], bool]:
    """A test of whether a case of bench.llama is of a kind.

    Example:
        >>> is_of_kind("decode")({"kind": "prefill"})
        False
    """
    return lambda case: bool(case["kind"] == kind)


TABLES = (
    Table(
        bench="llama",
        title="Decode of a whole model, ms a token, and times the floor",
        takes=is_of_kind("decode"),
        metrics={"loop_ms": ""},
        impls=(FLOOR, *MODELS),
        has_ratios=True,
    ),
    Table(
        bench="llama",
        title="One decode step that the host waits for, ms",
        takes=is_of_kind("decode"),
        metrics={"step_ms": ""},
        impls=MODELS,
    ),
    Table(
        bench="llama",
        title="Peak memory of decode, weights and cache included, GiB",
        takes=is_of_kind("decode"),
        metrics={"peak_gib": ""},
        impls=MODELS,
    ),
    Table(
        bench="llama",
        title="Prefill of a whole model, ms",
        takes=is_of_kind("prefill"),
        metrics={"prefill_ms": ""},
        impls=("flashcore_compiled", "flashcore_eager", "hf_compiled", "hf_eager"),
    ),
    Table(
        bench="llama",
        title="From a loaded model to its first decoded token, ms",
        takes=is_of_kind("compile"),
        metrics={"cold_ms": "compilers' caches empty", "warm_ms": "compilers' caches filled"},
        impls=("flashcore_loop", "flashcore_compiled", "hf_compiled"),
    ),
    Table(
        bench="attention",
        title="Decode attention, us",
        takes=is_among(DECODE),
        metrics={"us": ""},
        impls=(FLOOR, *ATTENTION),
    ),
    Table(
        bench="attention",
        title="Causal prefill attention, TFLOP/s",
        takes=is_among(PREFILL),
        metrics={"tflops": ""},
        impls=ATTENTION,
        is_more_better=True,
    ),
)


def render(directory: Path) -> str:
    """All results under a directory as Markdown: a section for each GPU, a paragraph for each results file."""
    parts = []
    for folder in sorted(path for path in directory.iterdir() if path.is_dir()):
        for bench in dict.fromkeys(table.bench for table in TABLES):
            path = folder / f"{bench}.json"
            if not path.is_file():
                continue
            results = json.loads(path.read_text())
            parts.append(describe_run(results["meta"]))
            parts += [render_table(table, results["rows"]) for table in TABLES if table.bench == bench]
            plots = [plot for plot in PLOTS if plot.bench == bench and lines_of(plot, results["rows"])]
            parts += [markdown_of(plot, folder.name) for plot in plots]
    return "\n\n".join(part for part in parts if part)


def describe_run(meta: Json) -> str:
    """What was measured on, in one line.

    Example:
        >>> describe_run({
        ...     "gpu": "GPU", "torch": "2.11.0", "triton": "3.6.0", "transformers": None, "commit": "a" * 40,
        ...     "date": "2026-11-23T01:07:16+00:00", "ceilings": {"read_tbs": 3.114, "matmul_tflops": 792.37},
        ... })
        'GPU, reads 3.11 TB/s, multiplies 792 TFLOP/s; torch 2.11.0, triton 3.6.0; commit aaaaaaaaaaaa, 2026-11-23'
    """
    versions = [f"{name} {meta[name]}" for name in ("torch", "triton", "transformers") if meta[name]]
    ceilings = meta["ceilings"]
    gpu = f"{meta['gpu']}, reads {ceilings['read_tbs']:.2f} TB/s, multiplies {ceilings['matmul_tflops']:.0f} TFLOP/s"
    commit = f"commit {short_commit(meta['commit'])}" if meta["commit"] else "commit unknown"
    return f"{gpu}; {', '.join(versions)}; {commit}, {meta['date'][:10]}"


def short_commit(commit: str) -> str:
    """The first digits, and whether there were changes on top.

    Example:
        >>> short_commit("0123456789abcdef-dirty")
        '0123456789ab-dirty'
    """
    digits, *rest = commit.split("-")
    return "-".join([digits[:12], *rest])


def render_table(table: Table, rows: Iterable[Json]) -> str:
    """A title and a table, or nothing where there are no figures."""
    rows = [row for row in rows if row["metric"] in table.metrics and table.takes(row["case"])]
    rows.sort(key=lambda row: (*order_of(row["case"]), list(table.metrics).index(row["metric"])))
    figures: dict[tuple[str, str], dict[str, float]] = {}
    for row in rows:
        key = shape_of(row["case"]), table.metrics[row["metric"]]
        figures.setdefault(key, {})[row["impl"]] = row["value"]
    shown = [name for name in table.impls if any(name in line for line in figures.values())]
    if not set(shown) - {FLOOR}:
        return ""
    subjects = dict.fromkeys(subject_of(row["case"]) for row in rows)
    lines = [
        f"**{table.title}** ({'; '.join(subjects)})",
        "",
        f"| | {' | '.join(LABELS[name] for name in shown)} |",
        "|---|" + "---:|" * len(shown),
    ]
    for (shape, label), line in figures.items():
        cells = render_cells([(name, line.get(name)) for name in shown], table)
        lines.append(f"| {', '.join(filter(None, (shape, label)))} | {' | '.join(cells)} |")
    return "\n".join(lines)


def render_cells(figures: Sequence[tuple[str, float | None]], table: Table) -> list[str]:
    """One line's figures, the best bold.

    Example:
        >>> render_cells([("floor", 5.0), ("flashcore_loop", 5.5), ("hf_compiled", 9.0), ("hf_eager", None)], TABLES[0])
        ['5.00', '**5.50** (1.10x)', '9.00 (1.80x)', '-']
    """
    floor = dict(figures).get(FLOOR)
    present = [value for name, value in figures if value is not None and name != FLOOR]
    best = (max if table.is_more_better else min)(present) if len(present) > 1 else None
    cells = []
    for name, value in figures:
        if value is None:
            cells.append("-")
            continue
        text = figure(value)
        if name != FLOOR:
            text = f"**{text}**" if value == best else text
            text += f" ({value / floor:.2f}x)" if table.has_ratios and floor else ""
        cells.append(text)
    return cells


def order_of(case: Json) -> tuple[int, ...]:
    """Where a case stands in its table: by batch at decode, by length elsewhere. Merged results files are unordered."""
    is_decode = case["kind"] == "decode" if "kind" in case else case["Q"] == 1
    sizes = (case["B"], case["S"]) if is_decode else (case["S"], case["B"])
    return (*sizes, case.get("capacity", 0))


def shape_of(case: Json) -> str:
    """Batch and length, and the cache's slots where they are not the usual number."""
    if "kind" not in case:
        return f"{case['B']} x {case['S']}"
    sizes = {"batch": case["B"], "length": case["S"], "capacity": case["capacity"]}
    return LlamaCase(kind=case["kind"], model=case["model"], layers=case["layers"], **sizes).shape


def subject_of(case: Json) -> str:
    """What the cases of a table have in common."""
    if "kind" in case:
        return f"batch x length; {case['model']}, {case['layers']} layers"
    heads = f"{case['Hq']} query and {case['Hkv']} KV heads, D = {case['D']}"
    return f"batch x length; {heads}, {case['dtype']}"


def render_families() -> str:
    """The table of families as Markdown."""
    header, *rows = (f"| {' | '.join(row)} |" for row in (FAMILY_COLUMNS, *family_rows()))
    return "\n".join([header, "|" + "---|" * len(FAMILY_COLUMNS), *rows])


def update(text: str, directory: Path) -> str:
    """README's text with its tables as the results files under a directory and the table of families have them."""
    return replace_part(replace_part(text, "families", render_families()), "results", render(directory))


def replace_part(text: str, name: str, content: str) -> str:
    """README's text with the part between the markers of a name replaced.

    Raises:
        ValueError: a marker is missing.

    Example:
        >>> replace_part("Before\\n<!-- a:begin -->\\nold\\n<!-- a:end -->\\nafter", "a", "new").splitlines()
        ['Before', '<!-- a:begin -->', '', 'new', '', '<!-- a:end -->', 'after']
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, found_begin, rest = text.partition(begin)
    _, found_end, after = rest.partition(end)
    if not (found_begin and found_end):
        raise ValueError(f"expected {begin} and, after it, {end}; got a text without them")
    return f"{before}{begin}\n\n{content}\n\n{end}{after}"


if __name__ == "__main__":
    write_plots(DIRECTORY)
    README.write_text(update(README.read_text(), DIRECTORY))
