"""Local commands: how they are run, shown, and kept from carrying secrets."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

# ssh hands on whatever a user's SendEnv names, so variables that look like secrets never reach it.
SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|API_?KEY", re.IGNORECASE)
SECRET_TEXT = re.compile(r"\bhf_\w{8,}|(?<=://)[^/\s@]+(?=@)")
END = "END"


@dataclass(frozen=True)
class Command:
    """A program with its arguments, and what its stdin and stdout are joined to."""

    argv: tuple[str, ...]
    script: str | None = None
    read_from: Path | None = None
    write_to: Path | None = None

    def shown(self) -> str:
        """The command as a POSIX shell takes it.

        Example:
            >>> print(Command(("ssh", "host", "sh -s"), script="echo 'a b'").shown())
            ssh host 'sh -s' <<'END'
            echo 'a b'
            END
            >>> Command(("tar", "-xf", "-"), read_from=Path("a b.tar")).shown()
            "tar -xf - <'a b.tar'"
        """
        line = shlex.join(self.argv)
        if self.read_from is not None:
            line += f" <{shlex.quote(str(self.read_from))}"
        if self.write_to is not None:
            line += f" >{shlex.quote(str(self.write_to))}"
        if self.script is None:
            return line
        end = END
        while end in self.script.splitlines():
            end += "_"
        return f"{line} <<'{end}'\n{self.script}\n{end}"


@dataclass(frozen=True)
class Finished:
    """How a command ended; `output` and `errors` are its stdout and stderr without secrets."""

    command: Command
    status: int
    output: str = ""
    errors: str = ""

    @property
    def said(self) -> str:
        """All that it printed."""
        return "\n".join(text.strip() for text in (self.output, self.errors) if text.strip())


def execute(command: Command) -> Finished:
    """Runs a command to its end; a program that is not installed gives the shell's status 127."""
    given = command.script.encode() if command.script is not None else None
    if command.read_from is not None:
        given = command.read_from.read_bytes()
    try:
        finished = subprocess.run(
            command.argv, input=given or b"", capture_output=True, env=without_secrets(os.environ), check=False
        )
    except FileNotFoundError as error:
        return Finished(command, status=127, errors=str(error))
    output = finished.stdout
    if command.write_to is not None:
        command.write_to.write_bytes(output)
        output = b""
    return Finished(command, finished.returncode, readable(output), readable(finished.stderr))


def start(command: Command) -> subprocess.Popen[bytes]:
    """Starts a command that says nothing and is not waited for."""
    silent = subprocess.DEVNULL
    environment = without_secrets(os.environ)
    return subprocess.Popen(command.argv, stdin=silent, stdout=silent, stderr=silent, env=environment)


def readable(data: bytes) -> str:
    """Text without carriage returns and secrets.

    Example:
        >>> readable(b"token hf_abcdefghij from https://me:pass@host/")
        'token *** from https://***@host/'
    """
    return SECRET_TEXT.sub("***", data.decode(errors="replace").replace("\r", ""))


def without_secrets(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables whose names do not look like those of secrets.

    Example:
        >>> without_secrets({"HF_TOKEN": "hf_abc", "HOME": "/root"})
        {'HOME': '/root'}
    """
    return {name: value for name, value in environment.items() if not SECRET_NAME.search(name)}
