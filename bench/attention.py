"""`python -m bench.attention`: decode and prefill attention on a GPU, FlashCore beside its peers.

Exit status: 0 all went well, 1 FlashCore was wrong or failed in some case, 2 there is no GPU or an option is wrong.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from bench import eager, first_call
from bench.attention_marks import MARKS
from bench.attention_runs import measure_cases
from bench.case_groups import GROUPS, QUICK
from bench.cases import Case
from bench.eager import measure_eager
from bench.figures import FLOOR, Figures
from bench.first_call import measure_first_call
from bench.harness import Ceilings, measure_ceilings, time_interleaved
from bench.peers import IMPLEMENTATIONS, SHOWN
from bench.plots import write_plots_of
from bench.report import render_group, render_host, render_marks, render_skips
from bench.results import DIRECTORY, Results, is_failure, make_meta, read_mergeable, write_results

# What the host does, measured last: its processes have the GPU beside this one's.
HOST_GROUPS = ("eager", "first_call")
NAMES = (*GROUPS, *HOST_GROUPS)


def parse_groups(text: str | None) -> list[str]:
    """The groups of a comma-separated list, in the usual order; all of them for None.

    Raises:
        typer.BadParameter: a group is unknown.

    Example:
        >>> parse_groups("prefill, decode")
        ['decode', 'prefill']
    """
    wanted = list(NAMES) if text is None else [word.strip() for word in text.split(",")]
    unknown = [name for name in wanted if name not in NAMES]
    if unknown:
        raise typer.BadParameter(f"expected groups out of {', '.join(NAMES)}, got {', '.join(unknown)!r}")
    return [name for name in NAMES if name in wanted]


def measure(
    groups: Mapping[str, Sequence[Case]], host_groups: Sequence[str], ceilings: Ceilings, l2_bytes: int, repeats: int
) -> Iterator[tuple[object, Results]]:
    """Each case of the groups once, with its results."""
    # Of our own: a capture that fails leaves the default generator unusable.
    generator = torch.Generator("cuda").manual_seed(0)
    cases = list(dict.fromkeys(case for group in groups.values() for case in group))
    timer = partial(time_interleaved, repeats=repeats)
    measured = measure_cases(
        cases, IMPLEMENTATIONS, ceilings=ceilings, l2_bytes=l2_bytes, generator=generator, timer=timer
    )
    yield from zip(cases, measured, strict=True)
    if "eager" in host_groups:
        for case in eager.CASES:
            yield case, measure_eager(case, generator, repeats)
    if "first_call" in host_groups:
        for name, case in first_call.CASES.items():
            yield case, measure_first_call(name)


def main(
    groups: Annotated[str | None, typer.Option(help=f"Comma-separated, out of {', '.join(NAMES)}.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A few cases of decode and prefill, few repeats.")] = False,
    output: Annotated[Path, typer.Option(help="Where <gpu>/attention.json goes.", show_default=False)] = DIRECTORY,
    commit: Annotated[str | None, typer.Option(help="Commit to record where the sources have no git history.")] = None,
) -> None:
    """Measure decode and prefill attention on the current GPU, FlashCore beside its peers.

    Results of other cases stay in the file if they are of the same commit, GPU and versions.
    """
    if quick and groups is not None:
        raise typer.BadParameter("expected --quick or --groups, got both")
    names = parse_groups(groups)
    if not torch.cuda.is_available():
        typer.echo("error: bench.attention needs a CUDA GPU, and torch sees none.", err=True)
        raise typer.Exit(code=2)
    # Tables are read in pipes and logs too, where rich would fold them at 80 columns.
    console = Console(highlight=False, width=None if Console().is_terminal else 120)
    chosen = QUICK if quick else {name: GROUPS[name] for name in names if name in GROUPS}
    host_groups = [] if quick else [name for name in names if name in HOST_GROUPS]
    repeats = 7 if quick else 20
    ceilings = measure_ceilings(repeats)
    gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
    meta = make_meta(gpu.name, ceilings, commit)
    bench = "attention-quick" if quick else "attention"
    kept = read_mergeable(output, bench, meta)
    console.print(
        f"{gpu.name}, torch {meta['torch']}, triton {meta['triton']}: copy {ceilings.copy_tbs:.2f} TB/s, "
        f"read {ceilings.read_tbs:.2f} TB/s, matmul {ceilings.matmul_tflops:.0f} TFLOP/s, "
        f"smallest graph kernel {ceilings.graph_kernel_us:.2f} us"
    )
    results = Results()
    for case, more in measure(chosen, host_groups, ceilings=ceilings, l2_bytes=gpu.L2_cache_size, repeats=repeats):
        results += more
        console.print(f"measured {case}")
        # After every case, so that a run cut short keeps what it measured.
        path = write_results(output, bench, meta, results.rows, results.skips, kept=kept)
    figures = Figures.of(json.loads(path.read_text()))
    for group, cases in chosen.items():
        console.print(*render_group(group, cases, [FLOOR, *(item.name for item in SHOWN)], figures))
    if host_groups:
        console.print(render_host([*eager.CASES, *first_call.CASES.values()], eager.IMPLS, figures))
    console.print(*render_marks(MARKS, figures))
    for line in render_skips(results.skips):
        console.print(line, soft_wrap=True, markup=False)
    plots = write_plots_of(path.parent) if find_spec("matplotlib") else []
    for written in (path, *plots):
        console.print(f"wrote {written}", soft_wrap=True, markup=False)
    if not plots:
        console.print("no plots: too few lengths were measured, or there is no matplotlib (extra `bench`)")
    if any(is_failure(skip) for skip in results.skips):
        raise typer.Exit(code=1)


if __name__ == "__main__":
    typer.run(main)
