"""The eight steps of a deployment. Each says in a line what it found, or raises StepError."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from hashlib import sha256

from flashcore_ops.deployment.failures import StepError, space_problem
from flashcore_ops.deployment.hub import fix_for
from flashcore_ops.deployment.jobs import Job, Observed
from flashcore_ops.deployment.remote import host_path, host_program
from flashcore_ops.deployment.session import Deployment
from flashcore_ops.deployment.state import State
from flashcore_ops.errors import DeploymentError, ValidationFailedError

ON_HOST = "flashcore_ops.deployment.on_host"


def reach(deployment: Deployment) -> str:
    """Connects, and asks for what later steps depend on."""
    answer = deployment.run(
        "uname -sm\n"
        "if command -v rsync >/dev/null; then echo rsync; else echo tar; fi\n"
        f"cat {deployment.host('state.json')} 2>/dev/null || :",
        expected="a shell on the host",
        fix="Check that the login shell there starts without errors.",
        assuming="the host\nrsync",
    )
    system, _, rest = answer.partition("\n")
    tool, _, kept = rest.partition("\n")
    remote = deployment.remote
    remote.reached(has_rsync=tool == "rsync")
    deployment.state = State.from_json(kept)
    return f"{deployment.request.destination.host}: {system}, copies by {'rsync' if remote.has_rsync else 'tar'}"


def find_gpu(deployment: Deployment) -> str:
    """Asks nvidia-smi; marks made with another GPU do not count."""
    answer = deployment.run(
        "if ! command -v nvidia-smi >/dev/null; then echo 'none: the host has no nvidia-smi'\n"
        "elif found=$(nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader 2>&1)\n"
        'then echo "gpu\n$found"\n'
        "else printf 'none: nvidia-smi says: %s\\n' \"$found\"; fi",
        expected="an answer about the GPU",
        assuming="none",
    )
    has_gpu = answer.startswith("gpu\n")
    gpu = describe_gpus(answer.splitlines()[1:]) if has_gpu else ""
    if deployment.state.gpu not in (None, gpu):
        deployment.require_idle()
        deployment.run(f"rm -rf {deployment.host('runs')}", expected="the results of another GPU removed")
        deployment.keep(replace(deployment.state.until("environment"), gpu=gpu))
    deployment.state = replace(deployment.state, gpu=gpu)
    return gpu or " ".join(answer.split())


def describe_gpus(lines: list[str]) -> str:
    """nvidia-smi's answer, a line for each GPU, in words.

    Example:
        >>> describe_gpus(["NVIDIA H100 80GB HBM3, 81559 MiB, 580.95.05"] * 2)
        '2 x NVIDIA H100 80GB HBM3, 81559 MiB, driver 580.95.05'
    """
    kinds = Counter(", driver ".join(line.strip().rsplit(", ", 1)) for line in lines)
    return "; ".join(kind if count == 1 else f"{count} x {kind}" for kind, count in kinds.items())


def copy_project(deployment: Deployment) -> str:
    """Makes the host's copy equal to the project's files."""
    project, target = deployment.project, deployment.host("project")

    def work() -> str:
        deployment.require_idle()
        deployment.run(f"umask 077\nmkdir -p {target}", expected="a directory that can be written")
        sent = deployment.remote.send(project.directory, target)
        deployment.require(sent, expected="the project's files on the host")
        left_out = f", left out: {', '.join(project.left_out)}" if project.left_out else ""
        return f"{project.num_files} files, sha256 {project.digest[:12]}{left_out}"

    return deployment.once("copy", project.digest, work, still=f"test -f {target}/pyproject.toml")


def make_environment(deployment: Deployment) -> str:
    """Lets the project's own set-up make `.venv` there, apart from this connection."""
    python = host_program(deployment.request.python)
    key = digest(deployment.project.digest, deployment.request.python)
    line = f"cd {deployment.host('project')} && exec {python} scripts/setup_env.py .venv"
    job = Job(deployment.remote, parent=deployment.host("runs"), name=f"environment-{key}", line=line)
    version = f"{deployment.host('project')}/.venv/bin/python --version"

    def work() -> str:
        deployment.require_idle(but=job.name)
        deployment.run(
            f"command -v {python}",
            expected=f"{deployment.request.python}, version 3.11 or newer, on the host",
            fix="Install it there, or name another interpreter with --python.",
        )
        if job.observe().state != "running":
            deployment.require(job.discard(), expected="the remains of an earlier set-up removed")
        finish(
            deployment,
            job,
            job.follow(deployment.progress),
            expected="an environment with everything installed",
            fix="Do what the set-up says below, or name another interpreter with --python, and run the same command "
            "again.",
        )
        return deployment.run(version, expected="an environment that runs", assuming="Python")

    return deployment.once("environment", key, work, still=version)


def smoke_test(deployment: Deployment) -> str:
    """Imports the ops there and runs attention once."""
    device = "cuda" if deployment.state.gpu else "cpu"
    return deployment.once(
        "smoke test",
        digest(deployment.project.digest, deployment.request.python),
        lambda: last_line(
            deployment.run(
                in_project(deployment, f"-m {ON_HOST}.smoke {device}"),
                expected=f"the ops to import and attention to agree with torch's on {device}",
                fix="The output below says what failed there; with a GPU, the driver may be too old for this torch.",
                assuming="attention agrees",
            )
        ),
    )


def check_hub_access(deployment: Deployment) -> str:
    """Asks whether the host may read the model; only a model of the hub can need a login."""
    request = deployment.request
    if request.hub_id is not None:
        script = in_project(deployment, f"-m {ON_HOST}.hub_access {shlex.quote(request.hub_id)}")
        finished = deployment.remote.run(script, assuming="open model")
        fix = fix_for(finished.status, request.hub_id, request.directory)
        found = deployment.require(finished, expected=f"access to {request.hub_id} on the hub", fix=fix)
        return last_line(found.output)
    if request.model is None:
        return "not needed: " + (f"random weights of {request.random}" if request.random else "the default model")
    deployment.run(
        f"test -f {host_path(request.model)}/config.json",
        expected=f"a model directory with a config.json at {request.model} on the host",
        fix="Put the model there, or pass the right path.",
    )
    return "not needed: a directory on the host"


def write_script(deployment: Deployment) -> str:
    """Writes what the next step runs, so that it can be run by hand too."""
    script = (
        "#!/bin/sh\n"
        "# Usage: sh run_validation.sh [DIRECTORY OF THE REPORT]\n"
        "set -eu\n"
        f"cd {deployment.host('project')}\n"
        f'exec .venv/bin/python -m flashcore_ops validate --output="${{1:-../report}}" '
        f"{deployment.request.validate_arguments()}\n"
    )
    path = deployment.host("run_validation.sh")
    deployment.run(
        f"umask 077\nprintf %s {shlex.quote(script)} >{path}.partial && mv {path}.partial {path} && chmod 700 {path}",
        expected="a script on the host",
    )
    return f"{deployment.request.directory}/run_validation.sh"


def validate(deployment: Deployment) -> str:
    """Runs the script apart from this connection, unless it has passed before, and brings the report back."""
    request = deployment.request
    name = f"validation-{digest(deployment.project.digest, request.python, request.validate_arguments())}"
    report = f"{deployment.host('runs')}/{name}/report"
    line = f"mkdir -p {report} && exec sh {deployment.host('run_validation.sh')} {report}"
    job = Job(deployment.remote, parent=deployment.host("runs"), name=name, line=line)
    has_report = f"test -f {report}/report.json"
    before = job.observe()
    passed_before = before.status == 0 and not request.rerun and deployment.holds(has_report)
    if not passed_before:
        deployment.require_idle(but=name)
    if not passed_before and before.state != "running":
        deployment.require(job.discard(), expected="the remains of an earlier run removed")
    ended = job.follow(deployment.progress)
    deployment.require(ended.finished, expected="the run to be watched to its end")
    is_written = deployment.holds(has_report)
    if is_written:
        fetched = deployment.remote.fetch(report, request.output)
        deployment.require(fetched, expected="the report on this machine")
    where = f"the report in {request.output}" if is_written else "the output below"
    fix = f"Read {where}, mend what it names, and run the same command again."
    finish(deployment, job, ended, expected="every scenario to pass", fix=fix, judges=True)
    if not is_written:
        raise StepError(expected="a report.json", got="none", fix=fix, command=job.line, said=ended.log)
    again = " (ran before, --rerun runs it again)" if passed_before else ""
    return f"passed, report in {request.output}{again}"


def finish(deployment: Deployment, job: Job, ended: Observed, *, expected: str, fix: str, judges: bool = False) -> None:
    """Raises StepError unless the job ended with status 0; status 1 of one that `judges` is its verdict."""
    deployment.require(ended.finished, expected=expected)
    if ended.status == 0:
        return
    got = f"exit status {ended.status}"
    problem = space_problem(ended.log)
    if ended.status is None:
        got = "a run that ended without an exit status"
        fix = "It was killed, for want of memory perhaps, or the host restarted. Run the same command again."
    elif problem is not None:
        got, fix = problem
    raise StepError(
        expected=expected,
        got=got,
        fix=fix,
        command=job.line,
        said=ended.log,
        is_verdict=judges and ended.status == 1 and problem is None,
    )


def in_project(deployment: Deployment, arguments: str) -> str:
    """A script that runs the environment's Python from the project's directory."""
    return f"cd {deployment.host('project')} && .venv/bin/python {arguments}"


def last_line(output: str) -> str:
    """What a program ended with; libraries may have printed before."""
    return (output.strip().splitlines() or [""])[-1]


def digest(*parts: str) -> str:
    """A short name for what the parts stand for."""
    return sha256("\0".join(parts).encode(errors="surrogateescape")).hexdigest()[:16]


@dataclass(frozen=True)
class Step:
    """A named step of a deployment."""

    name: str
    run: Callable[[Deployment], str]


STEPS = (
    Step("reach the host", reach),
    Step("find the GPU", find_gpu),
    Step("copy the project", copy_project),
    Step("make the environment", make_environment),
    Step("smoke test", smoke_test),
    Step("hub access", check_hub_access),
    Step("write run_validation.sh", write_script),
    Step("validate", validate),
)


def run_step(deployment: Deployment, step: Step) -> str:
    """Runs one step and returns what it found.

    Raises:
        ValidationFailedError: the validation ran and did not pass.
        DeploymentError: the step failed in any other way.
    """
    try:
        return step.run(deployment)
    except StepError as error:
        kind = ValidationFailedError if error.is_verdict else DeploymentError
        subject = f"step {STEPS.index(step) + 1} of {len(STEPS)}, {step.name}"
        explained = kind.explain(subject, expected=error.expected, got=error.got, fix=error.fix)
        raise kind(f"{explained}\n{error.details()}") from error
