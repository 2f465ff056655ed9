"""`python -m bench.first_token NAME`: milliseconds from a patched model to its first token, in a fresh process."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import torch
import typer

from bench.decoders import IMPLEMENTATIONS, Implementation
from bench.fresh_process import measure_cold_and_warm
from bench.gauge import CudaGauge, Gauge
from bench.llama_cases import LlamaCase, compile_case
from bench.models import Models, make_models
from bench.results import Results
from flashcore_ops import make_static_cache


def measure_first_tokens(
    implementations: Iterable[Implementation], case: LlamaCase, model: Path | None, layers: int | None
) -> Results:
    """Cold, with the compilers' caches empty, then warm, with what the cold run left in them; a process for each."""
    results = Results()
    options = [] if model is None else ["--model", str(model.resolve())]
    options += [] if layers is None else ["--layers", str(layers)]
    for implementation in implementations:
        if not implementation.is_eager:
            name = implementation.name
            results += measure_cold_and_warm("bench.first_token", [name, *options], case, name)
    return results


@torch.no_grad()
def first_token_ms(implementation: Implementation, models: Models, case: LlamaCase, gauge: Gauge) -> float:
    """Milliseconds to make the cache, compile, and decode one token."""
    start = gauge.seconds()
    cache = make_static_cache(models.patched, batch_size=case.batch, max_cache_len=case.capacity)
    decoder = implementation.build(models, cache)
    decoder.set_length(case.length - 1)
    decoder.decode(1)
    return (gauge.seconds() - start) * 1e3


def main(
    name: Annotated[str, typer.Argument(help="Implementation.", show_default=False)],
    model: Annotated[Path | None, typer.Option(help="A checkpoint's directory.")] = None,
    layers: Annotated[int | None, typer.Option(help="Keep only the first layers.")] = None,
) -> None:
    """Print the milliseconds from a patched model to the first token."""
    by_name = {item.name: item for item in IMPLEMENTATIONS}
    if name not in by_name:
        raise typer.BadParameter(f"expected one of {', '.join(by_name)}, got {name!r}")
    models = make_models(model, layers, torch.device("cuda"))
    case = compile_case(models.name, models.sizes.num_layers)
    typer.echo(first_token_ms(by_name[name], models, case, CudaGauge()))


if __name__ == "__main__":
    typer.run(main)
