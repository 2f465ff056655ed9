"""`flashcore deploy` against a real OpenSSH server: success, what is skipped, and what is never sent."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.deployment.conftest import Deploy
from tests.deployment.sshd import Host
from tests.deployment.stand_in import FILES

ODD = 'odd dir\'s $HOME "x" %h ünï'


def lines(host: Host, name: str) -> int:
    path = host.home / name
    return len(path.read_text().splitlines()) if path.exists() else 0


def test_success_and_a_second_run_that_skips(deploy: Deploy, host: Host, tmp_path: Path) -> None:
    first = deploy()
    assert first.exit_code == 0, first.output
    steps = first.stdout.splitlines()
    assert [step[0] for step in steps] == ["✓"] * 8
    assert [step[2:25].strip() for step in steps] == [
        "reach the host",
        "find the GPU",
        "copy the project",
        "make the environment",
        "smoke test",
        "hub access",
        "write run_validation.sh",
        "validate",
    ]
    assert "none: the host has no nvidia-smi" in steps[1]
    assert "left out: .env, deploy.pem" in steps[2]
    assert (tmp_path / "report" / "report.html").read_text() == "<p>report</p>"

    second = deploy()
    assert second.exit_code == 0, second.output
    assert [lines(host, name) for name in ("setups", "smokes", "validations")] == [1, 1, 1]
    assert second.stdout.count("(done before)") == 3
    assert "ran before, --rerun runs it again" in second.stdout
    assert deploy("--rerun").exit_code == 0
    assert [lines(host, name) for name in ("setups", "smokes", "validations")] == [1, 1, 2]


def test_odd_names_arrive_as_they_are(deploy: Deploy, host: Host, tmp_path: Path) -> None:
    model = host.home / "models" / ODD
    model.mkdir(parents=True)
    (model / "config.json").touch()
    result = deploy(f"~/models/{ODD}", "--directory", f"~/{ODD}", "--dtype", "a 'b' $c", "--baseline")
    assert result.exit_code == 0, result.output
    assert "not needed: a directory on the host" in result.stdout
    arguments = json.loads((tmp_path / "report" / "report.json").read_text())["arguments"]
    assert arguments[0] == "validate"
    assert arguments[2:] == ["--dtype=a 'b' $c", "--baseline", "--", str(model)]
    assert {path.name for path in host.home.iterdir()} == {"models", ODD, "setups", "smokes", "validations"}


def test_the_copy_is_what_git_knows_without_secrets(deploy: Deploy, host: Host, stand_in: Path) -> None:
    copied = host.home / ".cache/flashcore/deploy/project"
    assert deploy().exit_code == 0
    files = {path.relative_to(copied).as_posix() for path in copied.rglob("*") if path.is_file()}
    made = {name for name in files if name.startswith(".venv/") or "__pycache__" in name}
    assert files - made == FILES.keys() - {".env", "deploy.pem"}

    odd = 'odd name\'s $HOME "file".txt'
    (stand_in / odd).unlink()
    (stand_in / "pyproject.toml").write_text("changed\n")
    assert deploy().exit_code == 0
    assert not (copied / odd).exists()
    assert (copied / "pyproject.toml").read_text() == "changed\n"
    assert (copied / ".venv").is_dir()
    assert lines(host, "validations") == 2


@pytest.mark.parametrize("verdict", ["0", "1"])
def test_no_secret_leaves_this_machine(deploy: Deploy, host: Host, tmp_path: Path, verdict: str) -> None:
    (host.home / "verdict").write_text(verdict)
    (host.home / "secret").write_text("hf_secret")
    result = deploy()
    printed = result.output + deploy("--dry-run").output
    assert "hf_secret" not in printed
    files = [path for root in (host.home, tmp_path / "report") for path in root.rglob("*") if path.is_file()]
    # The search can find: it does find the file above.
    assert [path.name for path in files if b"hf_secret" in path.read_bytes()] == ["secret"]
    sent = json.loads((tmp_path / "report" / "report.json").read_text())["environment"]
    assert "HF_TOKEN" not in sent
    # ssh did hand on the rest of the environment, as its configuration says.
    assert "PYTEST_CURRENT_TEST" in sent
    assert str(host.identity) not in "".join(path.read_text(errors="replace") for path in files)


def test_a_failed_validation_brings_its_report(deploy: Deploy, host: Host, tmp_path: Path) -> None:
    (host.home / "verdict").write_text("1")
    failed = deploy()
    assert failed.exit_code == 1
    assert failed.stdout.splitlines()[-1].split() == ["✗", "validate", "failed"]
    assert "step 8 of 8, validate: expected every scenario to pass, got exit status 1." in failed.stderr
    assert "scenario 2 differs at token 7 ***" in failed.stderr
    assert (tmp_path / "report" / "report.json").is_file()
    (host.home / "verdict").write_text("0")
    assert deploy().exit_code == 0
    assert lines(host, "validations") == 2


def test_a_validation_that_cannot_run(deploy: Deploy, host: Host) -> None:
    (host.home / "verdict").write_text("2")
    failed = deploy()
    assert failed.exit_code == 2
    assert "got exit status 2. Read the output below" in failed.stderr


def test_gpus_are_named_and_another_one_is_validated_anew(deploy: Deploy, host: Host) -> None:
    smi = "echo 'NVIDIA H100 80GB HBM3, 81559 MiB, 580.95.05'"
    for script, found in [
        (f"{smi}; {smi}", "2 x NVIDIA H100 80GB HBM3, 81559 MiB, driver 580.95.05"),
        ("echo 'no driver found'; exit 9", "none: nvidia-smi says: no driver found"),
    ]:
        host.install("nvidia-smi", script)
        result = deploy()
        assert result.exit_code == 0, result.output
        assert found in result.stdout
    assert (host.home / "smokes").read_text() == "cuda\ncpu\n"
    assert [lines(host, name) for name in ("setups", "validations")] == [2, 2]


@pytest.mark.parametrize("side", ["host", "here"])
def test_tar_copies_where_rsync_is_missing(
    deploy: Deploy, host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, side: str
) -> None:
    if side == "host":
        (host.bin / "rsync").unlink()
    else:
        find = shutil.which
        monkeypatch.setattr(shutil, "which", lambda name: None if name == "rsync" else find(name))
    result = deploy("--directory", ODD)
    assert result.exit_code == 0, result.output
    assert "copies by tar" in result.stdout
    assert (tmp_path / "report" / "report.json").is_file()
    assert (host.home / ODD / "project" / 'odd name\'s $HOME "file".txt').is_file()


def test_dry_run_runs_nothing(deploy: Deploy, host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flashcore_ops.deployment.remote.execute", lambda command: pytest.fail("ran a command"))
    result = deploy("owner/model", "--dry-run")
    assert result.exit_code == 0, result.output
    assert host.connections() == 0
    assert not (tmp_path / "report").exists()
    for words in ("# 8. validate", "rsync --recursive", "scripts/setup_env.py .venv", "hub_access owner/model"):
        assert words in result.stdout
    assert result.stdout.count("StrictHostKeyChecking=yes") >= 8
    assert "StrictHostKeyChecking=no" not in result.stdout
    assert "UserKnownHostsFile" not in result.stdout
