"""`flashcore deploy`: puts FlashCore on another host, validates it there and brings the report back."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.status import Status
from rich.text import Text

from flashcore_ops.commands.console import stderr_console
from flashcore_ops.deployment.project import stage_project
from flashcore_ops.deployment.remote import Remote
from flashcore_ops.deployment.request import DeployRequest
from flashcore_ops.deployment.session import Deployment
from flashcore_ops.deployment.steps import STEPS, run_step
from flashcore_ops.errors import DeploymentError, OptionError

# What shells report for a program that Ctrl-C ended.
INTERRUPTED = 130
NAME_WIDTH = max(len(step.name) for step in STEPS)


class Mark(NamedTuple):
    """How a step ended; the word is for output that cannot write the symbol."""

    symbol: str
    word: str
    style: str


TICK = Mark("✓", "ok", "green")
CROSS = Mark("✗", "no", "red")


def run_deploy(request: DeployRequest, *, dry_run: bool = False) -> int:
    """Takes the eight steps, with a line each on stdout; a failure is explained on stderr.

    A dry run prints the commands in place of running them, as if the host were fresh, had rsync and no GPU.

    Returns:
        The exit status: 0 the validation passed, 1 it ran and did not, 2 a step failed, 130 Ctrl-C.

    Raises:
        FlashCoreError: the request cannot be served, or there is no project to copy.
    """
    request.check()
    with tempfile.TemporaryDirectory(prefix="flashcore-") as scratch:
        project = stage_project(Path(scratch) / "project")
        with Remote(request.destination, Path(scratch), show=print if dry_run else None) as remote:
            deployment = Deployment(request, project, remote)
            if not dry_run:
                make_output(request.output)
                return take_steps(deployment)
            print(f"# {project.directory} stands for a copy of the project, {project.num_files} files.")
            show_steps(deployment)
    return 0


def make_output(output: Path) -> None:
    """Makes the directory of the report now, and not after a long run."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OptionError.explain(
            "--output", expected="a directory that can be made", got=str(error), fix="Choose another path."
        ) from error


def show_steps(deployment: Deployment) -> None:
    """Prints the commands of every step."""
    for number, step in enumerate(STEPS, start=1):
        print(f"\n# {number}. {step.name}")
        run_step(deployment, step)


def take_steps(deployment: Deployment) -> int:
    """Runs the steps up to the first that fails; returns the exit status."""
    console, errors = Console(highlight=False, markup=False), stderr_console()
    console.soft_wrap = not console.is_terminal
    for step in STEPS:
        try:
            with errors.status(Text(step.name)) as status:
                deployment.progress = partial(show_news, status, step.name)
                found = run_step(deployment, step)
        except DeploymentError as error:
            console.print(line(CROSS, step.name, "failed", encoding=console.encoding))
            errors.print(Text.assemble(("error: ", "bold red"), str(error)))
            return error.exit_status
        except KeyboardInterrupt:
            console.print(line(CROSS, step.name, "interrupted", encoding=console.encoding))
            errors.print("What was started on the host runs on; the same command finds it again.")
            return INTERRUPTED
        console.print(line(TICK, step.name, found, encoding=console.encoding))
    return 0


def show_news(status: Status, name: str, news: str) -> None:
    """Puts the last line of a job's log behind the step's name."""
    status.update(Text(f"{name}: {news}"))


def line(mark: Mark, name: str, found: str, *, encoding: str) -> Text:
    """A step's line: a tick or a cross, its name, and what was found, as far as the encoding can write them.

    Example:
        >>> line(TICK, "smoke test", "näive", encoding="ascii").plain.split()
        ['ok', 'smoke', 'test', 'n?ive']
    """
    symbol = mark.symbol if encoding.lower().startswith("utf") else mark.word
    written = found.encode(encoding, errors="replace").decode(encoding)
    return Text.assemble((symbol, mark.style), f" {name:<{NAME_WIDTH}}  ", written)
