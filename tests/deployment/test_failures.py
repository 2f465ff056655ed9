"""`flashcore deploy` against a real OpenSSH server: every failure names the step, the command and what to do."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.deployment.conftest import Deploy
from tests.deployment.sshd import Host, free_port, make_key


def failure(deploy: Deploy, *arguments: str) -> str:
    """What a deployment says whose step fails; its first line explains, then come the command and its output."""
    result = deploy(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout.splitlines()[-1].startswith("✗ ")
    assert "\ncommand:\n  " in result.stderr
    assert "\nits output:\n  " in result.stderr
    return str(result.stderr)


def test_wrong_port(deploy: Deploy) -> None:
    said = failure(deploy, "--port", str(free_port()))
    assert "step 1 of 8, reach the host: expected a shell on the host, got no answer. Check HOST and --port" in said
    assert "Connection refused" in said


def test_refused_key(deploy: Deploy, tmp_path: Path) -> None:
    make_key(tmp_path / "other")
    said = failure(deploy, "--identity", str(tmp_path / "other"))
    assert "step 1 of 8, reach the host: expected a shell on the host, got a refused login." in said
    assert "Permission denied (publickey)" in said


def test_unknown_host_key(deploy: Deploy, host: Host) -> None:
    host.known_hosts.write_text("")
    said = failure(deploy)
    assert "step 1 of 8, reach the host: expected a shell on the host, got a host key that is not known." in said
    assert "fingerprint" in said
    assert "Host key verification failed" in said
    # Nothing was added on the way, though this client's configuration switches the checking off.
    assert host.known_hosts.read_text() == ""
    assert host.connections() == 0


def test_changed_host_key(deploy: Deploy, host: Host, tmp_path: Path) -> None:
    make_key(tmp_path / "other")
    host.know_key((tmp_path / "other.pub").read_text())
    assert "got another host key than the one that is known" in failure(deploy)
    assert host.connections() == 0


def test_an_account_without_a_shell(deploy: Deploy, host: Host) -> None:
    keys = host.root / "authorized_keys"
    keys.write_text(f'command="echo only backups here" {keys.read_text()}')
    said = failure(deploy)
    assert "step 1 of 8, reach the host: expected a shell on the host" in said
    assert "only backups here" in said


def test_no_python(deploy: Deploy, host: Host) -> None:
    (host.bin / "python3").unlink()
    said = failure(deploy)
    assert "step 4 of 8, make the environment: expected python3, version 3.11 or newer, on the host" in said
    assert "--python" in said
    assert "python3.99" in failure(deploy, "--python", "python3.99")


def test_failing_set_up(deploy: Deploy, host: Host) -> None:
    (host.home / "setup-fails").touch()
    said = failure(deploy)
    assert "step 4 of 8, make the environment: expected an environment with everything installed" in said
    assert "scripts/setup_env.py .venv" in said
    assert said.rstrip().endswith("set-up: needs a C compiler")
    (host.home / "setup-fails").unlink()
    assert deploy().exit_code == 0


def test_failing_smoke_test(deploy: Deploy, stand_in: Path) -> None:
    (stand_in / "flashcore_ops/deployment/on_host/smoke.py").write_text("raise SystemExit('difference 0.3')\n")
    said = failure(deploy)
    assert "step 5 of 8, smoke test: expected the ops to import and attention to agree with torch's on cpu" in said
    assert "difference 0.3" in said


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("gated/model", "/.venv/bin/hf auth login` on the host"),
        ("missing/model", "Check the name"),
        ("/no/such/model", "expected a model directory with a config.json at /no/such/model on the host"),
    ],
)
def test_no_access_to_the_model(deploy: Deploy, model: str, words: str) -> None:
    said = failure(deploy, model)
    assert "step 6 of 8, hub access: " in said
    assert words in said


def test_open_model_and_random_weights_need_no_login(deploy: Deploy) -> None:
    assert "open model" in deploy("open/model").stdout
    assert "not needed: random weights of llama-3.1-8b" in deploy("--random", "llama-3.1-8b").stdout


def test_no_report(deploy: Deploy, host: Host, stand_in: Path) -> None:
    (stand_in / "flashcore_ops/__main__.py").write_text("print('nothing written')\n")
    said = failure(deploy)
    assert "step 8 of 8, validate: expected a report.json, got none." in said
    assert "nothing written" in said


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB, where the test may mount one."""
    directory = tmp_path / "small"
    directory.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(directory)]
    try:
        mounted = subprocess.run(mount, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("needs mount")
    if mounted.returncode != 0:
        pytest.skip(f"may not mount a file system: {mounted.stderr.strip()}")
    yield directory
    subprocess.run(["umount", str(directory)], check=True)


@pytest.mark.parametrize("tool", ["rsync", "tar"])
def test_full_disk(deploy: Deploy, host: Host, stand_in: Path, small_disk: Path, tool: str) -> None:
    (stand_in / "pyproject.toml").write_bytes(bytes(200_000))
    if tool == "tar":
        (host.bin / "rsync").unlink()
    said = failure(deploy, "--directory", str(small_disk / "deploy"))
    assert "step 3 of 8, copy the project: expected the project's files on the host, got a full disk." in said
    assert "Make room on the host" in said
    assert ("No space left on device" if tool == "rsync" else "tar: ./pyproject.toml: ") in said


FULL = "No space left on device"


@pytest.mark.parametrize(
    ("program", "words", "step"),
    [
        ("rsync", f"rsync: [receiver] write failed: {FULL} (28)", "step 3 of 8, copy the project"),
        ("python3", f"ERROR: Could not install packages: [Errno 28] {FULL}", "step 4 of 8, make the environment"),
    ],
)
def test_words_for_a_full_disk(deploy: Deploy, host: Host, program: str, words: str, step: str) -> None:
    """A program that only says so: where no file system may be mounted, these are the tests of it."""
    host.install(program, f"echo '{words}' >&2; exit 11")
    said = failure(deploy)
    assert step in said
    assert "got a full disk. Make room on the host" in said
