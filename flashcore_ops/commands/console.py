"""Where status, figures and errors are written."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn


def stderr_console() -> Console:
    """A console on stderr that folds lines at words in a terminal and leaves them whole in a pipe.

    Example:
        >>> stderr_console().stderr
        True
    """
    console = Console(stderr=True, highlight=False, markup=False)
    console.soft_wrap = not console.is_terminal
    return console


@contextmanager
def stage(console: Console, doing: str) -> Iterator[None]:
    """While it lasts, a terminal shows what is going on and for how long; a pipe sees nothing of it.

    Example:
        >>> with stage(Console(stderr=True, force_terminal=False), "Counting"):
        ...     print(1 + 1)
        2
    """
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        progress.add_task(doing, total=None)
        yield


def count_of(number: int, noun: str) -> str:
    """A number and its noun.

    Example:
        >>> count_of(1, "token"), count_of(2, "token")
        ('1 token', '2 tokens')
    """
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
