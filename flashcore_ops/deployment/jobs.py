"""Work on the host that outlives the connection: started apart from it, then waited for from outside."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass

from flashcore_ops.deployment.commands import Finished
from flashcore_ops.deployment.remote import Remote

# One connection waits this often, a fifth of a second each, before the next one takes over.
WAITS_A_POLL = 50
SHOWN_LOG_LINES = 40

# Sets `state` from the files of a job: absent, running, lost, or finished STATUS. A process counts only while its
# command line names the job, since a restarted host gives its number to another; the status is read after that,
# since it is written before the process ends.
OBSERVE = """\
observe() {
    state=absent
    [ -d "$job" ] || return 0
    state=lost
    pid=$(cat "$job/pid" 2>/dev/null) || pid=
    if [ -n "$pid" ] && kill -0 "$pid" 2>/dev/null; then
        if [ ! -r "/proc/$pid/cmdline" ] || grep -q "$name" "/proc/$pid/cmdline"; then state=running; fi
    fi
    if [ -f "$job/status" ]; then state="finished $(cat "$job/status")"; fi
}
tell() { echo "$state"; tail -n LINES "$job/log" 2>/dev/null || :; }
""".replace("LINES", str(SHOWN_LOG_LINES))


@dataclass(frozen=True)
class Observed:
    """What a job was seen doing: `status` is its exit status once it has finished."""

    state: str
    status: int | None
    log: str
    finished: Finished

    @classmethod
    def of(cls, finished: Finished) -> Observed:
        """Reads the answer of OBSERVE and `tell`."""
        first, _, log = finished.output.partition("\n")
        matched = re.fullmatch(r"finished (\d+)", first.strip())
        state = "finished" if matched else first.strip()
        return cls(state, int(matched[1]) if matched else None, log.strip(), finished)


@dataclass(frozen=True)
class Job:
    """A shell command line on the host, with its log, process number and exit status in a directory of its own.

    `name` is that directory's name below `parent` (a `host_path`); equal names mean the same work.
    """

    remote: Remote
    parent: str
    name: str
    line: str

    @property
    def directory(self) -> str:
        """Where its files are, as the host's shell takes it."""
        return f"{self.parent}/{self.name}"

    def observe(self) -> Observed:
        """What the job is doing now."""
        return Observed.of(self.remote.run(f"{self._opening()}observe; tell", assuming="absent"))

    def discard(self) -> Finished:
        """Removes what an earlier run left, unless it is running."""
        return self.remote.run(f'{self._opening()}observe\n[ "$state" = running ] || rm -rf "$job"')

    def follow(self, progress: Callable[[str], None]) -> Observed:
        """Starts the job if there is none and waits for its end; `progress` gets the last line of its log."""
        while True:
            finished = self.remote.run(self._start_and_wait(), assuming="finished 0")
            observed = Observed.of(finished)
            if finished.status != 0 or observed.state != "running":
                return observed
            if observed.log:
                progress(observed.log.splitlines()[-1])

    def _opening(self) -> str:
        return f"umask 077\njob={self.directory}\nname={shlex.quote(self.name)}\n{OBSERVE}"

    def _start_and_wait(self) -> str:
        # Only one of two connections can make the directory, so the job starts once. It writes its number itself:
        # until then, its command line is still that of the shell that starts it.
        return f"""{self._opening()}
mkdir -p {self.parent} || exit 1
if mkdir "$job" 2>/dev/null; then
    printf '%s\\n' {shlex.quote(self._script())} >"$job/job.sh" || exit 1
    $(command -v setsid) nohup sh "$job/job.sh" "$job" >/dev/null 2>&1 </dev/null &
    waited=0
    while [ ! -f "$job/pid" ] && [ "$waited" -lt {WAITS_A_POLL} ]; do
        sleep 0.1
        waited=$((waited + 1))
    done
fi
waited=0
observe
while [ "$state" = running ] && [ "$waited" -lt {WAITS_A_POLL} ]; do
    sleep 0.2
    waited=$((waited + 1))
    observe
done
tell"""

    def _script(self) -> str:
        return f"""\
echo $$ >"$1/pid.partial"
mv "$1/pid.partial" "$1/pid"
status=0
sh -c {shlex.quote(self.line)} >"$1/log" 2>&1 || status=$?
echo "$status" >"$1/status.partial"
mv "$1/status.partial" "$1/status\""""


def running_jobs(remote: Remote, parent: str) -> Finished:
    """Prints the name and the process number of each job below `parent` (a `host_path`) that is running."""
    return remote.run(
        f"""{OBSERVE}
for job in {parent}/*/; do
    job=${{job%/}}
    name=${{job##*/}}
    observe
    if [ "$state" = running ]; then echo "$name $pid"; fi
done"""
    )
