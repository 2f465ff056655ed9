"""`python -m bench.first_call NAME`: milliseconds of the op's first call in a fresh process.

They hold all that a user waits for: Triton is imported, and kernels are compiled or read from its cache.
"""

from __future__ import annotations

from typing import Annotated

import torch
import typer

import flashcore_ops
from bench.accuracy import make_target, max_abs_error
from bench.cases import Case, HostCase
from bench.fresh_process import measure_cold_and_warm
from bench.gauge import CudaGauge, Gauge
from bench.results import Results

CASES = {
    "decode": HostCase("first_call", Case(batch=1, query_len=1, kv_len=2048)),
    "prefill": HostCase("first_call", Case(batch=1, query_len=2048, kv_len=2048)),
}


def measure_first_call(name: str) -> Results:
    """Metrics cold_ms, with Triton's cache empty, and warm_ms, with it filled; a process for each."""
    return measure_cold_and_warm("bench.first_call", [name], CASES[name], "flashcore")


@torch.no_grad()
def first_call_ms(case: Case, generator: torch.Generator, gauge: Gauge) -> float:
    """Milliseconds of the first call on a case's tensors.

    Raises:
        RuntimeError: the call gave a wrong result.
    """
    inputs = case.random_inputs(generator)
    start = gauge.seconds()
    output = flashcore_ops.attention(inputs.query, inputs.key, inputs.value, inputs.kv_range)
    milliseconds = (gauge.seconds() - start) * 1e3
    target = make_target(inputs)
    error = max_abs_error(output, target)
    if not error <= target.bar:
        raise RuntimeError(f"wrong: error {error:.3g} where {target.bar:.3g} passes")
    return milliseconds


def main(name: Annotated[str, typer.Argument(help=f"{' or '.join(CASES)}.", show_default=False)]) -> None:
    """Print the milliseconds of the first call."""
    if name not in CASES:
        raise typer.BadParameter(f"expected {' or '.join(CASES)}, got {name!r}")
    typer.echo(first_call_ms(CASES[name].case, torch.Generator("cuda").manual_seed(0), CudaGauge()))


if __name__ == "__main__":
    typer.run(main)
