"""What a command leaves when it refuses a request, and how its lines stand in a test's file."""

from __future__ import annotations

import textwrap

from click.testing import Result


def refusal(result: Result) -> str:
    """The one line that a refused request leaves."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1, result.stderr
    return str(result.stderr.rstrip("\n"))


def folded(lines: list[str]) -> str:
    """The lines, each folded to the width of a file."""
    return "\n".join(textwrap.fill(line, width=90, subsequent_indent="    ") for line in lines)
