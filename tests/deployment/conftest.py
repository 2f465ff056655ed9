"""A host to deploy to, a project to deploy, and the command between them."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from flashcore_ops.cli import app
from flashcore_ops.deployment import project, remote
from tests.deployment.sshd import PROGRAMS, SSHD, Host
from tests.deployment.stand_in import make_project

Deploy = Callable[..., Result]
MISSING = [program for program in (*PROGRAMS, "git", "ssh", "ssh-keygen") if shutil.which(program) is None]
MISSING += ["sshd"] * (SSHD is None)


@pytest.fixture(scope="session")
def why_no_host(tmp_path_factory: pytest.TempPathFactory) -> str | None:
    """Why this machine cannot be logged in to by its own user; None if it can."""
    if not sys.platform.startswith("linux"):
        return "the test's OpenSSH server needs Linux's /proc"
    if MISSING:
        return f"needs {', '.join(MISSING)} (Debian: openssh-server openssh-client rsync git)"
    host = Host(tmp_path_factory.mktemp("trial") / "host")
    try:
        host.start()
        said = host.refusal()
    except RuntimeError as error:
        said = str(error)
    finally:
        host.stop()
    # Such as an account that is locked or has no shell.
    return said and f"this user cannot log in to an OpenSSH server of its own: {said}"


@pytest.fixture
def host(tmp_path: Path, why_no_host: str | None) -> Iterator[Host]:
    """A host with python3 and rsync, and without a GPU."""
    if why_no_host:
        pytest.skip(why_no_host)
    host = Host(tmp_path / "host")
    host.install("python3", f'exec {sys.executable} "$@"')
    host.start()
    yield host
    host.stop()
    # A failed test leaves no run behind that waits for it.
    (host.home / "hold").unlink(missing_ok=True)


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of the project that is deployed in FlashCore's place."""
    root = make_project(tmp_path / "stand in")
    monkeypatch.setattr(project, "ROOT", root)
    return root


@pytest.fixture
def deploy(host: Host, stand_in: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Deploy:
    """Runs `flashcore deploy 127.0.0.1` with the host's options and those of the test."""
    monkeypatch.setattr(remote, "FIRST_PAUSE_SECONDS", 0.05)
    monkeypatch.setenv("HF_TOKEN", "hf_secret_of_the_environment")
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> Result:
        words = ["deploy", "127.0.0.1", *host.options, "--output", str(tmp_path / "report"), *arguments]
        return CliRunner().invoke(app, words, env={"FORCE_COLOR": None})

    return run
