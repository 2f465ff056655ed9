"""The `flashcore` command: arguments, errors and exit status. The work is done in flashcore_ops/commands.

Exit status: 0 all went well, 1 a comparison or a validation failed or a checked model is not served, 2 the request
cannot be served.
Results go to stdout; status, figures, warnings and errors go to stderr.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from flashcore_ops.errors import FlashCoreError

app = typer.Typer(
    help="FlashCore: inference attention for LLaMA-family models.",
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

# What several commands have in common.
ModelArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help="A local model directory or a Hugging Face hub id. Left out: SmolLM2-135M-Instruct.",
        show_default=False,
    ),
]
ConfigArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL_OR_CONFIG",
        help="A shape such as llama-3.1-8b, a model directory, a config.json, or a Hugging Face hub id.",
    ),
]
DtypeOption = Annotated[
    str,
    typer.Option(help="auto, float32, bfloat16 or float16. auto: bfloat16 on a GPU, float32 on the CPU."),
]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]


@app.callback()
def main() -> None:
    """Keeps `flashcore COMMAND` the form of every call."""


@app.command()
def generate(
    model: ModelArgument = None,
    prompt: Annotated[
        str, typer.Option("--prompt", "-p", help="Text to continue, as it is (no chat template).")
    ] = "Once upon a time",
    max_new_tokens: Annotated[
        int, typer.Option(help="Stop after this many tokens; memory for them is taken at the start.")
    ] = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy; above 0 samples.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    compare: Annotated[
        bool,
        typer.Option("--compare", help="Run Hugging Face's own attention too and report the first differing token."),
    ] = False,
) -> None:
    """Continue a prompt with a patched Hugging Face model, streaming the text."""
    with plain_errors():
        from flashcore_ops.commands.generate import run_generate
        from flashcore_ops.commands.request import GenerateRequest

        request = GenerateRequest(
            model=model,
            prompt=prompt,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            dtype=dtype,
            device=device,
            compare=compare,
        )
        agrees = run_generate(request)
    if not agrees:
        raise typer.Exit(code=1)


@app.command()
def validate(
    model: ModelArgument = None,
    random: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Random weights in a known shape instead, such as llama-3.1-8b."),
    ] = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    baseline: Annotated[
        bool,
        typer.Option("--baseline", help="Time decode at 512 to 4096 tokens too, beside sdpa eager and compiled."),
    ] = False,
    output: Annotated[Path, typer.Option(help="Directory for report.json, report.md and report.html.")] = Path(
        "flashcore-validation"
    ),
) -> None:
    """Hold a patched model against Hugging Face's sdpa in five scenarios, and write a report."""
    with plain_errors():
        from flashcore_ops.commands.validate import ValidateRequest, run_validate

        request = ValidateRequest(
            model=model, random=random, dtype=dtype, device=device, baseline=baseline, output=output
        )
        passed = run_validate(request)
    if not passed:
        raise typer.Exit(code=1)


@app.command()
def models() -> None:
    """Show the model families that can be patched, and what is used of each."""
    with plain_errors():
        from rich.console import Console

        from flashcore_ops.commands.models import render_models

        Console(highlight=False).print(render_models())


@app.command()
def check(
    model: ConfigArgument,
    dtype: DtypeOption = "auto",
    gpu: Annotated[
        str | None,
        typer.Option(
            metavar="ARCHITECTURE",
            help="Ask about such GPUs too, sm_90 say. Left out: this machine's GPUs, else its CPU.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Show whether a model will be served, by which kernels, and why not if not. Loads no weights."""
    with plain_errors():
        from rich.console import Console

        from flashcore_ops.commands.check import CheckRequest, make_report
        from flashcore_ops.commands.check_tables import render_check

        report = make_report(CheckRequest(model=model, dtype=dtype, gpu=gpu))
        Console(highlight=False).print(render_check(report))
    if report.refusal is not None:
        raise typer.Exit(code=1)


@app.command()
def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print the same as JSON.")] = False,
) -> None:
    """Show versions, GPUs, and which kernels would run and why."""
    with plain_errors():
        from rich.console import Console

        from flashcore_ops.commands.info import collect_info, render_info, to_json

        found = collect_info()
        if as_json:
            print(to_json(found))
        else:
            Console().print(render_info(found))


@app.command()
def memory(
    model: ConfigArgument,
    gpu_memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE|NAME",
            help="A size such as 80GB, or a GPU such as H100. Left out: the GPU that torch sees, else 80GB.",
            show_default=False,
        ),
    ] = None,
    batch: Annotated[
        list[int] | None,
        typer.Option(help="Rows of the cache; repeat it for several. Left out: 1, 8, 32.", show_default=False),
    ] = None,
    length: Annotated[
        list[int] | None,
        typer.Option(
            help="Tokens a row, prompt included; repeat it for several. Left out: 512 to 131072.", show_default=False
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", help="Size of the weights. Left out: as many as the model has, in bf16.", show_default=False
        ),
    ] = None,
    reserve: Annotated[
        str, typer.Option(metavar="SIZE", help="Kept free for activations, logits and graphs.")
    ] = "2GiB",
) -> None:
    """Show a model's KV-cache memory, MHA beside GQA, and what fits into a GPU."""
    with plain_errors():
        from rich.console import Console

        from flashcore_ops.commands.memory import MemoryRequest, make_report
        from flashcore_ops.commands.memory_tables import render_memory

        request = MemoryRequest(
            model=model,
            gpu_memory=gpu_memory,
            batches=batch or (),
            lengths=length or (),
            weights=weights,
            reserve=reserve,
        )
        Console(highlight=False).print(render_memory(make_report(request)))


@app.command()
def deploy(
    host: Annotated[str, typer.Argument(metavar="HOST", help="A host, or its name in ssh's configuration.")],
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="A hub id, or a directory on the host as /path or ~/path. Left out: SmolLM2-135M-Instruct.",
            show_default=False,
        ),
    ] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="ssh's port.")] = None,
    user: Annotated[str | None, typer.Option(help="Who to log in as.")] = None,
    identity: Annotated[Path | None, typer.Option(help="The private key's file; it stays here.")] = None,
    ssh_config: Annotated[Path | None, typer.Option(help="Read this in place of ssh's own configuration.")] = None,
    directory: Annotated[str, typer.Option(help="Where everything goes on the host.")] = "~/.cache/flashcore/deploy",
    python: Annotated[str, typer.Option(help="The host's Python, 3.11 or newer.")] = "python3",
    random: Annotated[
        str | None, typer.Option(metavar="NAME", help="Validate random weights of this shape, such as llama-3.1-8b.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="As of `flashcore validate`.")] = None,
    baseline: Annotated[bool, typer.Option("--baseline", help="As of `flashcore validate`.")] = False,
    output: Annotated[Path, typer.Option(help="Where the report goes on this machine.")] = Path("flashcore-validation"),
    rerun: Annotated[bool, typer.Option("--rerun", help="Validate again although it passed before.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the commands and run none.")] = False,
) -> None:
    """Install FlashCore on another host over ssh, validate it there, and bring the report back."""
    with plain_errors():
        from flashcore_ops.commands.deploy import run_deploy
        from flashcore_ops.deployment.remote import Destination
        from flashcore_ops.deployment.request import DeployRequest

        request = DeployRequest(
            destination=Destination(host, port=port, user=user, identity=identity, ssh_config=ssh_config),
            model=model,
            random=random,
            dtype=dtype,
            baseline=baseline,
            directory=directory,
            python=python,
            output=output,
            rerun=rerun,
        )
        status = run_deploy(request, dry_run=dry_run)
    if status != 0:
        raise typer.Exit(code=status)


bench = typer.Typer(help="Measure FlashCore beside its peers on this GPU, from a checkout.", no_args_is_help=True)
app.add_typer(bench, name="bench")
# The benchmark has options of its own, --help among them.
PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


@bench.command(context_settings=PASSED_ON)
def attention(context: typer.Context) -> None:
    """Attention alone, beside SDPA, FlexAttention and FlashInfer: `flashcore bench attention --help` for options."""
    run_bench("attention", context.args)


@bench.command(context_settings=PASSED_ON)
def llama(context: typer.Context) -> None:
    """A whole LLaMA model, beside Hugging Face: `flashcore bench llama --help` for options."""
    run_bench("llama", context.args)


def run_bench(name: str, arguments: list[str]) -> None:
    """Leaves with the benchmark's own exit status."""
    with plain_errors():
        from flashcore_ops.commands.bench import run_benchmark

        status = run_benchmark(name, arguments)
    raise typer.Exit(code=status)


@contextmanager
def plain_errors() -> Iterator[None]:
    """Turns errors raised on purpose into one line on stderr and exit status 2."""
    try:
        yield
    except FlashCoreError as error:
        from rich.text import Text

        from flashcore_ops.commands.console import stderr_console

        line = " ".join(str(error).split())
        stderr_console().print(Text.assemble(("error: ", "bold red"), line))
        raise typer.Exit(code=2) from None
