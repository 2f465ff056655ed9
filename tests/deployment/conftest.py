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


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    """A host with python3 and rsync, and without a GPU."""
    if not sys.platform.startswith("linux"):
        pytest.skip("the test's OpenSSH server needs Linux's /proc")
    if MISSING:
        pytest.skip(f"needs {', '.join(MISSING)} (Debian: openssh-server openssh-client rsync git)")
    host = Host(tmp_path / "host")
    host.install("python3", f'exec {sys.executable} "$@"')
    host.start()
    yield host
    host.stop()


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
