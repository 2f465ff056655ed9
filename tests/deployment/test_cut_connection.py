"""`flashcore deploy` when the server's processes of its connection are killed in the middle of a step."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from flashcore_ops.deployment import remote
from tests.deployment.conftest import Deploy
from tests.deployment.sshd import Host

SECONDS_TO_WAIT = 10.0
# What a connection carries before it is cut, and a file that takes more. Random, since the copy is compressed.
CUT_AFTER = 300_000
LARGE = 1_000_000


def when(path: Path, act: Callable[[], None]) -> threading.Thread:
    """Acts as soon as a file is there."""

    def wait() -> None:
        deadline = time.monotonic() + SECONDS_TO_WAIT
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        act()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


# Passes bytes on as they come, since rsync's two sides take turns; gives the test time to cut.
RELAY = f"""
import os, sys, time
passed = 0
while passed < {CUT_AFTER} and (data := os.read(0, 8192)):
    passed += os.write(1, data)
open(sys.argv[1], "w").close()
time.sleep(0.5)
"""


@pytest.fixture
def cut_while_copying(host: Host, stand_in: Path) -> threading.Thread:
    """The host's first rsync gets CUT_AFTER bytes; then the connection is cut, and later ones are whole."""
    (stand_in / "pyproject.toml").write_bytes(random.Random(0).randbytes(LARGE))
    (host.root / "relay.py").write_text(RELAY)
    rsync = (host.bin / "rsync").readlink()
    host.install(
        "rsync",
        f'[ -e "$HOME/cut" ] && exec {rsync} "$@"\npython3 {host.root}/relay.py "$HOME/cut" | {rsync} "$@"',
    )
    return when(host.home / "cut", host.cut)


def test_a_cut_copy_is_mended(deploy: Deploy, host: Host, cut_while_copying: threading.Thread) -> None:
    result = deploy()
    cut_while_copying.join()
    assert result.exit_code == 0, result.output
    assert (host.home / "cut").exists()
    assert (host.home / ".cache/flashcore/deploy/project/pyproject.toml").stat().st_size == LARGE


def test_a_cut_copy_is_resumed_by_the_next_run(
    deploy: Deploy, host: Host, cut_while_copying: threading.Thread, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(remote, "ATTEMPTS", 1)
        result = deploy()
    cut_while_copying.join()
    assert result.exit_code == 2
    assert "step 3 of 8, copy the project: expected the project's files on the host, got a lost connection." in (
        result.stderr
    )
    assert "Run the same command again" in result.stderr
    copy = host.home / ".cache/flashcore/deploy/project/pyproject.toml"
    when(copy, lambda: None).join()
    # What had arrived was kept for the next run to go on from.
    assert 0 < copy.stat().st_size < LARGE
    result = deploy()
    assert result.exit_code == 0, result.output
    assert copy.stat().st_size == LARGE
    assert "(done before)" not in result.stdout


def test_a_cut_run_goes_on_and_is_found_again(deploy: Deploy, host: Host, tmp_path: Path) -> None:
    hold = host.home / "hold"
    hold.touch()

    def cut() -> None:
        host.cut()
        hold.unlink()

    waiting = when(host.home / "validations", cut)
    result = deploy()
    waiting.join()
    assert result.exit_code == 0, result.output
    assert (host.home / "validations").read_text() == "started\n"
    assert (tmp_path / "report" / "report.json").is_file()


def test_a_host_that_is_gone_for_longer(deploy: Deploy, host: Host, tmp_path: Path) -> None:
    hold = host.home / "hold"
    hold.touch()
    waiting = when(host.home / "validations", host.stop)
    lost = deploy()
    waiting.join()
    assert lost.exit_code == 2
    assert "step 8 of 8, validate: expected the run to be watched to its end, got a lost connection." in lost.stderr
    assert "what was started on the host runs on" in lost.stderr
    assert "Connection refused" in lost.stderr
    assert not (tmp_path / "report" / "report.json").exists()

    host.start()
    # Other arguments would be another run beside it.
    blocked = deploy("--baseline")
    assert blocked.exit_code == 2
    assert "expected no job of an earlier deployment, got validation-" in blocked.stderr
    assert "kill -- -" in blocked.stderr

    waiting = when(tmp_path / "again", hold.unlink)
    (tmp_path / "again").touch()
    result = deploy()
    waiting.join()
    assert result.exit_code == 0, result.output
    assert (host.home / "validations").read_text() == "started\n"


def test_a_killed_run_starts_over(deploy: Deploy, host: Host) -> None:
    hold = host.home / "hold"
    hold.touch()

    def kill() -> None:
        (pid,) = host.home.glob(".cache/flashcore/deploy/runs/validation-*/pid")
        os.killpg(int(pid.read_text()), signal.SIGKILL)

    waiting = when(host.home / "validations", kill)
    killed = deploy()
    waiting.join()
    assert killed.exit_code == 2
    assert "step 8 of 8, validate: expected every scenario to pass, got a run that ended without an exit status." in (
        killed.stderr
    )
    hold.unlink()
    assert deploy().exit_code == 0
    assert (host.home / "validations").read_text() == "started\n" * 2
