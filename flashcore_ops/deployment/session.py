"""One deployment under way: what its steps share, and what they know of the host."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass, field

from flashcore_ops.deployment.commands import Finished
from flashcore_ops.deployment.failures import StepError, require
from flashcore_ops.deployment.jobs import running_jobs
from flashcore_ops.deployment.project import Project
from flashcore_ops.deployment.remote import SSH_LOST, Remote, host_path
from flashcore_ops.deployment.request import DeployRequest
from flashcore_ops.deployment.state import Mark, State

AGAIN = "Run the same command again: it goes on where it stopped."


@dataclass
class Deployment:
    """One deployment under way; `progress` gets passing news."""

    request: DeployRequest
    project: Project
    remote: Remote
    progress: Callable[[str], None] = field(default=lambda news: None)
    state: State = field(default_factory=State)

    def host(self, name: str = "") -> str:
        """A path below the deployment's directory, as the host's shell takes it; `name` is a plain word."""
        directory = host_path(self.request.directory)
        return f"{directory}/{name}" if name else directory

    def run(self, script: str, *, expected: str, fix: str = AGAIN, assuming: str = "") -> str:
        """Runs a script on the host and returns what it printed; raises StepError where it fails."""
        finished = self.remote.run(script, assuming=assuming)
        return self.require(finished, expected=expected, fix=fix).output.strip()

    def holds(self, script: str) -> bool:
        """Whether a script succeeds on the host; raises StepError where the connection is lost."""
        finished = self.remote.run(script)
        if finished.status == SSH_LOST:
            self.require(finished, expected="an answer from the host")
        return finished.status == 0

    def require(self, finished: Finished, *, expected: str, fix: str = AGAIN) -> Finished:
        """As `failures.require`."""
        unreached = None if self.remote.is_reached else self.request.destination
        return require(finished, expected=expected, fix=fix, unreached=unreached)

    def keep(self, state: State) -> None:
        """Notes on the host what has been done."""
        path = self.host("state.json")
        write = f"printf %s {shlex.quote(state.to_json())} >{path}.partial && mv {path}.partial {path}"
        self.run(f"umask 077\nmkdir -p {self.host()} && {write}", expected="a directory that can be written")
        self.state = state

    def once(self, step: str, key: str, work: Callable[[], str], *, still: str = "true") -> str:
        """Does a step's work, unless it was done for this key and the script `still` succeeds on the host."""
        found = self.state.found(step, key)
        if found is not None and self.holds(still):
            return f"{found} (done before)"
        if step in self.state.marks:
            self.keep(self.state.until(step))
        found = work()
        self.keep(self.state.with_mark(step, Mark(key, found)))
        return found

    def require_idle(self, but: str = "") -> None:
        """Raises StepError if a job of an earlier deployment, other than `but`, is running: it uses the same files."""
        finished = self.require(running_jobs(self.remote, self.host("runs")), expected="a list of running jobs")
        others = [line.split() for line in finished.output.splitlines() if line and line.split()[0] != but]
        if others:
            name, process = others[0]
            raise StepError(
                expected="no job of an earlier deployment",
                got=f"{name} running there",
                fix=f"Wait for its end, or stop it on the host with: kill -- -{process}",
                command=finished.command.shown(),
                said=finished.said,
            )
