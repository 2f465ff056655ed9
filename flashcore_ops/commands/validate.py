"""`flashcore validate`: five scenarios against Hugging Face's attention, a summary, and a report."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from flashcore_ops.checks import dtype_name
from flashcore_ops.commands.console import stage, stderr_console
from flashcore_ops.commands.loading import check_model_name, load_model, resolve_device, resolve_dtype
from flashcore_ops.default_model import default_model_path
from flashcore_ops.errors import OptionError
from flashcore_ops.kv_memory import KVShape
from flashcore_ops.model_shapes import random_model, shape_config
from flashcore_ops.validation.baseline import Latency, judge, measure_latencies
from flashcore_ops.validation.plots import check_matplotlib
from flashcore_ops.validation.report import Report, latency_table, write_report
from flashcore_ops.validation.scenarios import SCENARIOS, Result, failed, run_scenario
from flashcore_ops.validation.subject import Subject

# Lengths of the report's memory plot.
PLOTTED_LENGTHS = tuple(512 << doubling for doubling in range(9))


@dataclass(frozen=True)
class ValidateRequest:
    """The arguments of `flashcore validate`, as they were typed."""

    model: str | None
    random: str | None
    dtype: str
    device: str
    baseline: bool
    output: Path


def run_validate(request: ValidateRequest) -> bool:
    """Runs all scenarios, prints a summary to stdout and writes the report; False if one failed.

    Raises:
        FlashCoreError: if the request cannot be served.
    """
    if request.model is not None and request.random is not None:
        raise OptionError.explain("MODEL and --random", expected="one of them", got="both", fix="Leave one out.")
    check_matplotlib()
    console = stderr_console()
    subject = load_subject(request, console)
    results, latencies = run_scenarios(subject, console, has_baseline=request.baseline)
    report = Report(describe(subject), results, latencies, cache_bytes_by_length(subject))
    out = Console(highlight=False)
    out.print(summary_table(results))
    if latencies:
        out.print(baseline_table(latencies))
    out.print(report.verdict())
    for path in write_report(report, request.output):
        console.print(f"wrote {path}", style="dim")
    return report.passed


def load_subject(request: ValidateRequest, console: Console) -> Subject:
    """The model that the request names, on Hugging Face's attention."""
    device = resolve_device(request.device)
    dtype = resolve_dtype(request.dtype, device)
    if request.random is not None:
        config = shape_config(request.random)
        with stage(console, f"Making {request.random} with random weights"):
            return Subject(f"{request.random}, random weights", random_model(config, dtype, device), tokenizer=None)
    if request.model is not None:
        check_model_name(request.model)
    name = str(default_model_path()) if request.model is None else request.model
    transformers.utils.logging.disable_progress_bar()
    with stage(console, "Loading the model") if Path(name).is_dir() else nullcontext():
        model, tokenizer = load_model(name, dtype=dtype, device=device)
    return Subject(request.model or "SmolLM2-135M-Instruct", model, tokenizer)


def run_scenarios(subject: Subject, console: Console, *, has_baseline: bool) -> tuple[list[Result], list[Latency]]:
    """Every scenario's result, and the baseline's figures if asked for. A terminal sees how far it is."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    results: list[Result] = []
    latencies: list[Latency] = []
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("validating", total=len(SCENARIOS) + has_baseline)
        for scenario in SCENARIOS:
            progress.update(task, description=scenario.__name__.replace("_", " "))
            results.append(run_scenario(scenario, subject))
            mark = "pass" if results[-1].passed else "FAIL"
            console.print(f"{mark}  {results[-1].name}: {results[-1].evidence}")
            progress.advance(task)
        if has_baseline:
            try:
                for latency in measure_latencies(subject):
                    latencies.append(latency)
                    progress.update(task, description=f"baseline, {latency.impl} at {latency.length}")
                results.append(judge(latencies))
            except Exception as error:
                results.append(failed("baseline", error))
            console.print(f"{'pass' if results[-1].passed else 'FAIL'}  {results[-1].name}: {results[-1].evidence}")
            progress.advance(task)
    return results, latencies


def describe(subject: Subject) -> dict[str, str]:
    """What was validated, and on what."""
    is_cuda = subject.device.type == "cuda"
    return {
        "model": subject.name,
        "dtype": dtype_name(subject.dtype),
        "device": torch.cuda.get_device_name(subject.device) if is_cuda else "CPU",
        "torch": torch.__version__,
        "triton": _version("triton"),
        "transformers": transformers.__version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def cache_bytes_by_length(subject: Subject) -> dict[str, dict[int, float]]:
    """Bytes of one sequence's KV cache, with the model's KV heads and with as many as it has query heads."""
    shape = KVShape.of(subject.model.config)
    return {
        f"{name}, {heads.num_kv_heads} heads": {
            length: float(heads.cache_bytes(batch=1, length=length, dtype=subject.dtype)) for length in PLOTTED_LENGTHS
        }
        for name, heads in (("GQA", shape), ("MHA", shape.as_mha()))
    }


def summary_table(results: Sequence[Result]) -> Table:
    """A line for each scenario."""
    table = Table("scenario", "result", "ms a token", "peak memory", "seconds")
    for column in table.columns[2:]:
        column.justify = "right"
    for result in results:
        ms, peak = result.figures.get("ms_per_token"), result.figures.get("peak_bytes")
        table.add_row(
            result.name,
            "[green]pass[/]" if result.passed else "[bold red]FAIL[/]",
            "-" if ms is None else f"{ms:.2f}",
            "-" if peak is None else f"{peak / 2**30:.2f} GiB",
            f"{result.seconds:.1f}",
        )
    return table


def baseline_table(latencies: Sequence[Latency]) -> Table:
    """A line for each length."""
    impls, rows = latency_table(latencies)
    table = Table("tokens in the cache", *[f"{impl}, ms a token" for impl in impls])
    for column in table.columns:
        column.justify = "right"
    for length, cells in rows:
        table.add_row(str(length), *cells)
    return table


def _version(package: str) -> str:
    try:
        return version(package)
    except ModuleNotFoundError:
        return "not installed"
