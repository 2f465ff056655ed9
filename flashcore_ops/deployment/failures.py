"""What a failing command means, and what to do about it."""

from __future__ import annotations

import textwrap

from flashcore_ops.deployment.commands import Finished
from flashcore_ops.deployment.remote import RSYNC_LOST, SSH_LOST, Destination

SHOWN_LINES = 40
LOST = (
    "a lost connection",
    "Run the same command again: it goes on where it stopped, and what was started on the host runs on.",
)


class StepError(Exception):
    """A step cannot go on: what it expected, what came instead, what to do, and the command that told.

    `is_verdict` marks a validation that ran to its end and did not pass.
    """

    def __init__(self, *, expected: str, got: str, fix: str, command: str, said: str, is_verdict: bool = False) -> None:
        super().__init__(got)
        self.expected = expected
        self.got = got
        self.fix = fix
        self.is_verdict = is_verdict
        self._command = command
        self._said = said

    def details(self) -> str:
        """The command and the last lines of what it said, indented."""
        said = "\n".join(self._said.splitlines()[-SHOWN_LINES:]) or "(nothing)"
        indent = "  "
        return f"command:\n{textwrap.indent(self._command, indent)}\nits output:\n{textwrap.indent(said, indent)}"


def require(finished: Finished, *, expected: str, fix: str, unreached: Destination | None = None) -> Finished:
    """Returns a command that ended well; explains any other, by its own words where they are known.

    `unreached` is a destination that has not answered yet, so that its name, port or keys may be wrong.

    Raises:
        StepError: the command did not exit with status 0.
    """
    if finished.status == 0:
        return finished
    said = finished.said
    program = finished.command.argv[0]
    is_lost = finished.status in {"ssh": (SSH_LOST,), "rsync": RSYNC_LOST}.get(program, ())
    known = space_problem(said)
    if known is None and is_lost:
        known = LOST if unreached is None else connection_problem(said, unreached)
    if known is not None:
        got, fix = known
    elif finished.status == 127 and program in said:
        got, fix = f"no {program} on this machine", f"Install {program}."
    else:
        got = f"exit status {finished.status}"
    raise StepError(expected=expected, got=got, fix=fix, command=finished.command.shown(), said=said)


def space_problem(said: str) -> tuple[str, str] | None:
    """What came and what to do, if a disk is full.

    Example:
        >>> space_problem("tar: x: Cannot write: No space left on device")[0]
        'a full disk'
    """
    # "Wrote only" is tar's word for it.
    if any(words in said for words in ("No space left on device", "Disk quota exceeded", "Errno 28", "Wrote only ")):
        return "a full disk", "Make room on the host, or choose another disk with --directory."
    return None


def connection_problem(said: str, destination: Destination) -> tuple[str, str]:
    """What came and what to do, by ssh's words."""
    host = destination.host
    if "REMOTE HOST IDENTIFICATION HAS CHANGED" in said:
        return (
            "another host key than the one that is known",
            f"Somebody may be listening in, or {host} was set up anew. Ask its owner for the new fingerprint; only "
            "if it matches, remove the old key as ssh says below.",
        )
    if "Host key verification failed" in said:
        port = "" if destination.port is None else f"-p {destination.port} "
        return (
            "a host key that is not known",
            f"Get its fingerprint from the host's owner or console (ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub "
            f"there), then connect once by hand (ssh {port}{host}), compare, and answer yes only if they match.",
        )
    if "Permission denied" in said or "Too many authentication failures" in said:
        return (
            "a refused login",
            "Check --user and --identity; a key with a passphrase must be in ssh-agent (ssh-add).",
        )
    if "Could not resolve hostname" in said:
        return "a name that nothing answers to", "Check HOST."
    if any(words in said for words in ("Connection refused", "timed out", "No route to host", "unreachable")):
        return "no answer", "Check HOST and --port, that the host is up, and that a firewall lets ssh through."
    return "no connection", "See what ssh says below; connecting by hand with ssh -v says more."
