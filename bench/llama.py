"""`python -m bench.llama`: a whole LLaMA model on a GPU, FlashCore beside Hugging Face.

Exit status: 0 all went well, 1 FlashCore was wrong or failed in some case, 2 there is no GPU or an option is wrong.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from bench.decoders import IMPLEMENTATIONS, Implementation
from bench.figures import Figures
from bench.first_token import measure_first_tokens
from bench.gauge import CudaGauge
from bench.harness import measure_ceilings
from bench.llama_cases import (
    BATCHES,
    LENGTHS,
    PREFILL_LENGTHS,
    QUICK_BATCHES,
    QUICK_LENGTHS,
    compile_case,
    decode_cases,
    prefill_cases,
)
from bench.llama_marks import MARKS
from bench.llama_report import render_columns, render_decode
from bench.llama_runs import EAGER_EFFORT, Effort, measure_case
from bench.models import LLAMA_3_1_8B, make_models
from bench.report import render_marks, render_skips
from bench.results import DIRECTORY, Results, is_failure, make_meta, read_mergeable, write_results

NAMES = tuple(item.name for item in IMPLEMENTATIONS)


def parse_integers(text: str | None, default: Sequence[int]) -> list[int]:
    """The positive integers of a comma-separated list, none for an empty text, `default` for None.

    Raises:
        typer.BadParameter: it is something else.

    Example:
        >>> parse_integers("1, 8", default=[]), parse_integers("", default=[1]), parse_integers(None, default=[1])
        ([1, 8], [], [1])
    """
    if text is None:
        return list(default)
    words = [word.strip() for word in text.split(",")] if text.strip() else []
    if not all(word.isdecimal() and int(word) > 0 for word in words):
        raise typer.BadParameter(f"expected positive integers with commas between, got {text!r}")
    return [int(word) for word in words]


def parse_implementations(text: str | None) -> list[Implementation]:
    """The implementations of a comma-separated list of names, in the usual order; all of them for None.

    Raises:
        typer.BadParameter: a name is unknown.

    Example:
        >>> [item.name for item in parse_implementations("flashcore_loop,hf_eager")]
        ['hf_eager', 'flashcore_loop']
    """
    wanted = list(NAMES) if text is None else [word.strip() for word in text.split(",")]
    unknown = [name for name in wanted if name not in NAMES]
    if unknown:
        raise typer.BadParameter(f"expected names out of {', '.join(NAMES)}, got {', '.join(unknown)!r}")
    return [item for item in IMPLEMENTATIONS if item.name in wanted]


def main(
    quick: Annotated[bool, typer.Option("--quick", help="Batch 1, lengths 512 and 2048, two rounds.")] = False,
    model: Annotated[
        Path | None, typer.Option(help="A local checkpoint, instead of LLaMA-3.1-8B's shape with random weights.")
    ] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="Keep only the first layers.")] = None,
    implementations: Annotated[str | None, typer.Option(help=f"Comma-separated, out of {', '.join(NAMES)}.")] = None,
    batches: Annotated[str | None, typer.Option(help="Comma-separated batches of decode.")] = None,
    lengths: Annotated[str | None, typer.Option(help="Comma-separated lengths of decode; '' for none.")] = None,
    prefill_lengths: Annotated[str | None, typer.Option(help="The same of prefill; '' for none.")] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Turns of each implementation.", show_default="3")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of a loop.")] = Effort.tokens,
    eager_rounds: Annotated[
        int | None, typer.Option(min=1, help="Turns of eager decode, of few tokens each.", show_default="15")
    ] = None,
    output: Annotated[Path, typer.Option(help="Where <gpu>/llama.json goes.", show_default=False)] = DIRECTORY,
    commit: Annotated[str | None, typer.Option(help="Commit to record where the sources have no git history.")] = None,
    skip_compile_time: Annotated[bool, typer.Option("--skip-compile-time", help="Start no fresh processes.")] = False,
) -> None:
    """Measure decode, prefill and compile time of a LLaMA model on the current GPU.

    Results of other cases and implementations stay in the file if they are of the same commit, GPU and versions.
    """
    chosen = parse_implementations(implementations)
    decode_lengths = parse_integers(lengths, default=QUICK_LENGTHS if quick else LENGTHS)
    decode_batches = parse_integers(batches, default=QUICK_BATCHES if quick else BATCHES)
    prompt_lengths = parse_integers(prefill_lengths, default=QUICK_LENGTHS if quick else PREFILL_LENGTHS)
    effort = Effort(rounds=rounds or (2 if quick else Effort.rounds), tokens=tokens)
    eager_effort = replace(EAGER_EFFORT, rounds=eager_rounds or (5 if quick else EAGER_EFFORT.rounds))
    if skip_compile_time and not (decode_batches and decode_lengths) and not prompt_lengths:
        raise typer.BadParameter("expected something to measure, got no lengths and --skip-compile-time")
    if not torch.cuda.is_available():
        typer.echo("error: bench.llama needs a CUDA GPU, and torch sees none.", err=True)
        raise typer.Exit(code=2)
    # Tables are read in pipes and logs too, where rich would fold them at 80 columns.
    console = Console(highlight=False, width=None if Console().is_terminal else 120)
    gauge = CudaGauge()
    device = torch.device("cuda", torch.cuda.current_device())
    ceilings = measure_ceilings(repeats=7 if quick else 20)
    # The ceilings' buffers are still cached, and the model needs the room.
    gauge.free_bytes()
    meta = make_meta(torch.cuda.get_device_properties(device).name, ceilings, commit)
    bench = "llama-quick" if quick else "llama"
    kept = read_mergeable(output, bench, meta)
    models = make_models(model, layers, device)
    decode = decode_cases(models.name, models.sizes.num_layers, batches=decode_batches, lengths=decode_lengths)
    prefill = prefill_cases(models.name, models.sizes.num_layers, lengths=prompt_lengths)
    first_token = [] if skip_compile_time else [compile_case(models.name, models.sizes.num_layers)]
    console.print(
        f"{meta['gpu']}, torch {meta['torch']}, triton {meta['triton']}, transformers {meta['transformers']}: "
        f"read {ceilings.read_tbs:.2f} TB/s; {models.name}, {models.sizes.num_layers} layers"
    )
    results = Results()
    for case in decode + prefill + first_token:
        if case.kind == "compile":
            results += measure_first_tokens(chosen, case, model=model, layers=layers)
        else:
            results += measure_case(
                *(case, models, chosen),
                read_tbs=ceilings.read_tbs,
                effort=effort,
                eager_effort=eager_effort,
                gauge=gauge,
            )
        console.print(f"measured {case}")
        # After every case, so that a run cut short keeps what it measured.
        path = write_results(output, bench, meta, results.rows, results.skips, kept=kept)
    names = [item.name for item in chosen]
    console.print(render_decode(decode, names, results.rows))
    console.print(render_columns("Prefill", prefill, names, results.rows, metrics=["prefill_ms", "peak_gib"]))
    console.print(render_columns("First token", first_token, names, results.rows, metrics=["cold_ms", "warm_ms"]))
    if models.name == LLAMA_3_1_8B:
        console.print(*render_marks(MARKS, Figures.of(json.loads(path.read_text()))))
    for line in render_skips(results.skips):
        console.print(line, soft_wrap=True, markup=False)
    console.print(f"wrote {path}", soft_wrap=True, markup=False)
    if any(is_failure(skip) for skip in results.skips):
        raise typer.Exit(code=1)


if __name__ == "__main__":
    typer.run(main)
