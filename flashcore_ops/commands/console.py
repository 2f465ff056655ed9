"""Where status, figures and errors are written."""

from __future__ import annotations

from rich.console import Console


def stderr_console() -> Console:
    """A console on stderr that folds lines at words in a terminal and leaves them whole in a pipe.

    Example:
        >>> stderr_console().stderr
        True
    """
    console = Console(stderr=True, highlight=False, markup=False)
    console.soft_wrap = not console.is_terminal
    return console
