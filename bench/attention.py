"""`python -m bench.attention`: decode and prefill attention on a GPU, FlashCore beside its peers.

Exit status: 0 all went well, 1 FlashCore was wrong or failed in some case, 2 there is no GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from torch import Tensor

from bench.accuracy import Target, make_target, max_abs_error
from bench.cases import DECODE, PREFILL, QUICK_DECODE, QUICK_PREFILL, Case, Inputs
from bench.harness import (
    Ceilings,
    Timing,
    calls_per_graph,
    describe,
    measure_ceilings,
    num_input_sets,
    time_interleaved,
)
from bench.peers import FLASHCORE, PEERS, Implementation
from bench.report import render_skips, render_table
from bench.results import DIRECTORY, Row, Skip, make_meta, write_results

# Calls by implementation, input sets, calls a graph.
Timer = Callable[[Mapping[str, Callable[[Inputs], Tensor]], Sequence[Inputs], int], Timing]


def judge(implementation: Implementation, inputs: Inputs, target: Target) -> tuple[float | None, str]:
    """The error of a right result and "", or None and why the implementation is not to be timed."""
    try:
        reason = implementation.why_not(inputs)
        if reason is not None:
            return None, f"cannot run: {reason}"
        # The allocator hands this block to the next tensor of its size, so an element left unwritten is NaN.
        poison = torch.full_like(inputs.query, torch.nan)
        del poison
        output = implementation(inputs)
        if output.shape != target.exact.shape or output.dtype != inputs.query.dtype:
            return None, f"wrong: gave {output.dtype} {list(output.shape)}"
        error = max_abs_error(output, target)
    except Exception as failure:
        return None, f"failed: {describe(failure)}"
    if error <= target.bar:
        return error, ""
    return None, f"wrong: error {error:.3g} where {target.bar:.3g} passes"


def measure_case(
    case: Case,
    implementations: Sequence[Implementation],
    floor_us: float,
    l2_bytes: int,
    generator: torch.Generator,
    timer: Timer,
) -> tuple[list[Row], list[Skip]]:
    """Checks every implementation of a case, then times those that are right.

    Args:
        floor_us: the least time of one call, from which the number of calls in a graph follows.
        l2_bytes: size of the cache that the rotated inputs must exceed.
        generator: draws the inputs, on its own device.
    """
    rows, skips = [Row(case, "floor", "us", floor_us)], []
    inputs = [case.random_inputs(generator) for _ in range(num_input_sets(case.num_bytes, l2_bytes))]
    target = make_target(inputs[0])
    calls: dict[str, Callable[[Inputs], Tensor]] = {}
    for implementation in implementations:
        error, reason = judge(implementation, inputs[0], target)
        if error is None:
            skips.append(Skip(case, implementation.name, reason))
            continue
        rows.append(Row(case, implementation.name, "max_abs_err", error))
        calls[implementation.name] = implementation
    del target
    timing = timer(calls, inputs, calls_per_graph(floor_us, len(inputs)))
    skips += [Skip(case, name, f"failed: {reason}") for name, reason in timing.failures.items()]
    for name, microseconds in timing.microseconds.items():
        rows.append(Row(case, name, "us", microseconds))
        if not case.is_decode:
            rows.append(Row(case, name, "tflops", case.tflops(microseconds)))
    return rows, skips


def measure_cases(
    cases: Sequence[Case],
    implementations: Sequence[Implementation],
    ceilings: Ceilings,
    l2_bytes: int,
    generator: torch.Generator,
    timer: Timer,
) -> Iterator[tuple[list[Row], list[Skip]]]:
    """Rows and skips of one case after another; a case that fails as a whole is skipped for all implementations."""
    for case in cases:
        floor_us = case.floor_us(read_tbs=ceilings.read_tbs, matmul_tflops=ceilings.matmul_tflops)
        try:
            result = measure_case(
                case, implementations, floor_us=floor_us, l2_bytes=l2_bytes, generator=generator, timer=timer
            )
        except Exception as error:
            result = [], [Skip(case, item.name, f"failed: {describe(error)}") for item in implementations]
        yield result


def main(
    quick: Annotated[bool, typer.Option("--quick", help="A few cases and repeats, under a minute.")] = False,
    output: Annotated[Path, typer.Option(help="Where <gpu>/attention.json goes.", show_default=False)] = DIRECTORY,
    commit: Annotated[str | None, typer.Option(help="Commit to record where the sources have no git history.")] = None,
) -> None:
    """Measure decode and prefill attention on the current GPU, FlashCore beside its peers."""
    if not torch.cuda.is_available():
        typer.echo("error: bench.attention needs a CUDA GPU, and torch sees none.", err=True)
        raise typer.Exit(code=2)
    # Tables are read in pipes and logs too, where rich would fold them at 80 columns.
    console = Console(highlight=False, width=None if Console().is_terminal else 120)
    repeats = 7 if quick else 20
    ceilings = measure_ceilings(repeats)
    gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
    meta = make_meta(gpu.name, ceilings, commit)
    console.print(
        f"{gpu.name}, torch {meta['torch']}, triton {meta['triton']}: copy {ceilings.copy_tbs:.2f} TB/s, "
        f"read {ceilings.read_tbs:.2f} TB/s, matmul {ceilings.matmul_tflops:.0f} TFLOP/s, "
        f"smallest graph kernel {ceilings.graph_kernel_us:.2f} us"
    )
    implementations = [FLASHCORE, *PEERS]
    decode, prefill = (QUICK_DECODE, QUICK_PREFILL) if quick else (DECODE, PREFILL)
    measured = measure_cases(
        decode + prefill,
        implementations,
        ceilings=ceilings,
        l2_bytes=gpu.L2_cache_size,
        # One of our own: a capture that fails leaves the default generator unusable.
        generator=torch.Generator("cuda").manual_seed(0),
        timer=partial(time_interleaved, repeats=repeats),
    )
    rows: list[Row] = []
    skips: list[Skip] = []
    for case, (case_rows, case_skips) in zip(decode + prefill, measured, strict=True):
        console.print(f"measured {case}")
        rows += case_rows
        skips += case_skips
        # After every case, so that a run cut short keeps what it measured.
        path = write_results(output, "attention-quick" if quick else "attention", meta, rows, skips)
    names = [item.name for item in implementations]
    console.print(render_table("Decode, us", decode, names, rows, metric="us"))
    console.print(render_table("Prefill, TFLOP/s", prefill, names, rows, metric="tflops"))
    for line in render_skips(skips):
        console.print(line, soft_wrap=True, markup=False)
    console.print(f"wrote {path}", soft_wrap=True, markup=False)
    if any(skip.impl == FLASHCORE.name for skip in skips):
        raise typer.Exit(code=1)


if __name__ == "__main__":
    typer.run(main)
