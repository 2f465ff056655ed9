"""A host behind the system's ssh: runs shell scripts there and copies directories to and from it."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from flashcore_ops.deployment.commands import Command, Finished, execute, start

# Host keys are always checked, whatever the user's own configuration says; nothing is asked at a terminal.
SSH_OPTIONS = (
    *("-T", "-a", "-x"),
    *("-o", "BatchMode=yes"),
    *("-o", "StrictHostKeyChecking=yes"),
    *("-o", "RemoteCommand=none"),
    *("-o", "ControlMaster=no"),
    *("-o", "ControlPersist=no"),
    *("-o", "ConnectTimeout=15"),
    *("-o", "ServerAliveInterval=10"),
    *("-o", "ServerAliveCountMax=3"),
)
SSH_LOST = 255
# The shell's own status for a program that cannot be run.
NO_SHELL = 126
# What rsync exits with when its connection breaks or times out, and what ssh does.
RSYNC_LOST = (10, 12, 30, 35, SSH_LOST)
ATTEMPTS = 4
FIRST_PAUSE_SECONDS = 1.0
# ssh's word for connections that stand alone.
NO_SOCKET = "none"
# Of the 104 bytes that the tightest system allows, ssh takes 17 for a name of its own while it starts to listen.
LONGEST_SOCKET_PATH = 86
# A host's shell start-up files may print; only what follows this line is ours.
MARK = "--- flashcore ---"
# What the host makes beside the project's own files.
MADE_ON_HOST = ("/.venv", "__pycache__", "*.egg-info")


@dataclass(frozen=True)
class Destination:
    """Where ssh connects to; None leaves a choice to ssh's own configuration."""

    host: str
    port: int | None = None
    user: str | None = None
    identity: Path | None = None
    ssh_config: Path | None = None

    def ssh(self) -> tuple[str, ...]:
        """The ssh program and its options, without the host."""
        argv: tuple[str, ...] = ("ssh", *SSH_OPTIONS)
        if self.ssh_config is not None:
            argv += ("-F", str(self.ssh_config))
        if self.port is not None:
            argv += ("-p", str(self.port))
        if self.user is not None:
            argv += ("-l", self.user)
        if self.identity is not None:
            argv += ("-o", "IdentitiesOnly=yes", "-o", f"IdentityFile={configuration_word(str(self.identity))}")
        return argv


def configuration_word(text: str) -> str:
    """A path as ssh's configuration takes it: quoted, and with `%` standing for itself.

    Example:
        >>> print(configuration_word('my "100%" key'))
        "my \\"100%%\\" key"
    """
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return f'"{escaped}"'


def host_path(path: str) -> str:
    """A path on the host as its shell takes it; relative paths and `~/` start at the home directory.

    Example:
        >>> host_path("~/.cache/a b"), host_path("/data/it's"), host_path("~")
        ('"$HOME"/\\'.cache/a b\\'', '\\'/data/it\\'"\\'"\\'s\\'', '"$HOME"')
    """
    if path.startswith("/"):
        return shlex.quote(path)
    rest = path.removeprefix("~").lstrip("/")
    return f'"$HOME"/{shlex.quote(rest)}' if rest else '"$HOME"'


def host_program(name: str) -> str:
    r"""A program of the host as its shell takes it: one on the PATH, or a path, which may start with `~/`.

    Example:
        >>> host_program("python3.12"), host_program("~/my env/bin/python")
        ('python3.12', '"$HOME"/\'my env/bin/python\'')
    """
    return host_path(name) if name.startswith("~/") else shlex.quote(name)


class Remote:
    """Runs and copies through one destination; `scratch` is a local directory for its socket and archives.

    Once the host was reached, one connection is kept that the others go through. Without it they stand alone.
    With `show`, commands are handed to it in place of being run, and each returns what its caller assumes.
    """

    def __init__(self, destination: Destination, scratch: Path, show: Callable[[str], None] | None = None) -> None:
        self.destination = destination
        self.has_rsync = shutil.which("rsync") is not None
        # Before the first answer, a failing connection is a wrong address or key, which no second try mends.
        self.is_reached = False
        self._scratch = scratch
        self._show = show
        socket = str(scratch / "ssh")
        self._socket = socket if len(socket.encode()) <= LONGEST_SOCKET_PATH else NO_SOCKET
        self._kept: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._kept is not None:
            self._kept.terminate()
            self._kept.wait()

    def reached(self, *, has_rsync: bool) -> None:
        """Says that the host has answered, and whether it has rsync: from now on cut connections are mended."""
        self.is_reached = True
        self.has_rsync = self.has_rsync and has_rsync
        if self._show is not None and self._socket != NO_SOCKET:
            self._show(f"{self._keeper().shown()} &")

    def run(self, script: str, *, assuming: str = "") -> Finished:
        """Runs a POSIX shell script on the host, again after a cut connection: it must bear running twice."""
        # The shell reads the braces to the end before it starts, so half a script never runs, and no
        # command in it reads the rest as its input. Through stdin, no login shell parses it either.
        whole = f"{{\necho '{MARK}'\n{script}\n}} </dev/null"
        command = Command((*self._ssh(), "--", self.destination.host, "exec sh -s"), script=whole)
        finished = self._attempt(command, lost=(SSH_LOST,), assuming=assuming)
        if self._show is not None:
            return finished
        before, mark, answer = finished.output.partition(MARK + "\n")
        if finished.status == 0 and not mark:
            # Such as an account whose key may run one fixed command.
            return Finished(command, NO_SHELL, before, finished.errors)
        return Finished(command, finished.status, answer or before, finished.errors)

    def send(self, source: Path, target: str) -> Finished:
        """Makes the host's directory `target` (a `host_path`) equal to `source`, but for what was made there."""
        if self.has_rsync:
            keep = tuple(f"--exclude={name}" for name in MADE_ON_HOST)
            flags = ("--delete", "--links", "--perms", *keep)
            return self._rsync(f"{source}/", f"{self._rsync_host()}:./", directory=target, flags=flags)
        archive = self._scratch / "project.tar"
        packed = self._attempt(Command(("tar", "-C", str(source), "-cf", str(archive), ".")))
        if packed.status != 0:
            return packed
        clear = f"find {target} -mindepth 1 -maxdepth 1 ! -name .venv -exec rm -rf {{}} +"
        unpack = f"{clear} && tar -C {target} -xf -"
        return self._attempt(Command(self._in_shell(unpack), read_from=archive), lost=(SSH_LOST,))

    def fetch(self, source: str, target: Path) -> Finished:
        """Copies the files of the host's directory `source` (a `host_path`) into the existing `target`."""
        if self.has_rsync:
            return self._rsync(f"{self._rsync_host()}:./", f"{target}/", directory=source, flags=())
        archive = self._scratch / "report.tar"
        pack = self._in_shell(f"tar -C {source} -cf - .")
        packed = self._attempt(Command(pack, write_to=archive), lost=(SSH_LOST,))
        if packed.status != 0:
            return packed
        return self._attempt(Command(("tar", "-C", str(target), "-xf", str(archive))))

    def _ssh(self) -> tuple[str, ...]:
        return (*self.destination.ssh(), "-S", self._socket)

    def _keeper(self) -> Command:
        return Command((*self._ssh(), "-M", "-N", "--", self.destination.host))

    def _keep_connection(self) -> None:
        if self._socket != NO_SOCKET and (self._kept is None or self._kept.poll() is not None):
            # What a killed one left would keep the next one from listening.
            Path(self._socket).unlink(missing_ok=True)
            self._kept = start(self._keeper())

    def _in_shell(self, line: str) -> tuple[str, ...]:
        return (*self._ssh(), "--", self.destination.host, f"exec sh -c {shlex.quote(line)}")

    def _rsync_host(self) -> str:
        user, at, host = self.destination.host.rpartition("@")
        return f"{user}{at}[{host}]" if ":" in host else f"{user}{at}{host}"

    def _rsync(self, source: str, target: str, *, directory: str, flags: tuple[str, ...]) -> Finished:
        argv = ("rsync", "--recursive", "--times", "--partial", "--compress", *flags)
        # The host's shell enters the directory: how rsync quotes remote paths differs between its versions.
        argv += (f"--rsh={shlex.join(self._ssh())}", f"--rsync-path=cd {directory} && rsync")
        return self._attempt(Command((*argv, "--", source, target)), lost=RSYNC_LOST)

    def _attempt(self, command: Command, *, lost: tuple[int, ...] = (), assuming: str = "") -> Finished:
        if self._show is not None:
            self._show(command.shown())
            return Finished(command, status=0, output=assuming)
        pause = FIRST_PAUSE_SECONDS
        for _ in range(ATTEMPTS - 1 if self.is_reached else 0):
            self._keep_connection()
            finished = execute(command)
            if finished.status not in lost:
                return finished
            time.sleep(pause)
            pause *= 2
        return execute(command)
