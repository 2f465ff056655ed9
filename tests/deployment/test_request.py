"""What `flashcore deploy` refuses before it reaches a host, and where its pieces quote."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flashcore_ops.cli import app
from flashcore_ops.commands import deploy as command
from flashcore_ops.deployment.remote import Destination, Remote
from tests.refusals import refusal
from tests.snapshots import assert_expected_inline


def error_line(*arguments: str) -> str:
    """The one line that a refused request leaves."""
    return refusal(CliRunner().invoke(app, ["deploy", *arguments], env={"FORCE_COLOR": None}))


def test_refused_before_the_host_is_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").mkdir()
    (tmp_path / "file").touch()
    lines = [
        error_line("--", "-oProxyCommand=x"),
        error_line("ssh://gpu:22"),
        error_line("me@gpu", "--user", "you"),
        error_line("gpu", "--identity", "missing"),
        error_line("gpu", "--ssh-config", "missing"),
        error_line("gpu", "--directory", "~you/deploy"),
        error_line("gpu", "--output", "file"),
        error_line("gpu", "--output", "file/below"),
        error_line("gpu", "weights"),
        error_line("gpu", "a model"),
        error_line("gpu", "owner/model", "--random", "llama-3.1-8b"),
    ]
    assert_expected_inline(
        "\n".join(textwrap.fill(line, width=100, subsequent_indent="    ") for line in lines),
        """\
error: HOST: expected a name of ssh's configuration, a host name, or an IP address, got
    '-oProxyCommand=x'. Pass the port and the user as --port and --user.
error: HOST: expected a name of ssh's configuration, a host name, or an IP address, got
    'ssh://gpu:22'. Pass the port and the user as --port and --user.
error: --user: expected one user name, got 'you' for me@gpu. Name the user once.
error: --identity: expected a file, got none at missing. Check the path.
error: --ssh-config: expected a file, got none at missing. Check the path.
error: --directory: expected a path on the host, absolute or below the home directory, got
    '~you/deploy'. Write it as /path or ~/path.
error: --output: expected a directory, got a file, file. Choose another path.
error: --output: expected a directory that can be made, got [Errno 20] Not a directory:
    'file/below'. Choose another path.
error: MODEL: expected a hub id, or a directory on the host as /path or ~/path, got 'weights'.
    Weights are not copied: put them on the host and pass their path there.
error: MODEL: expected a hub id, or a directory on the host as /path or ~/path, got 'a model'.
    Weights are not copied: put them on the host and pass their path there.
error: --random: expected no MODEL beside it, got 'owner/model'. Pass one of the two.""",
    )


def test_ipv6_addresses_are_bracketed_for_rsync_alone(tmp_path: Path) -> None:
    shown: list[str] = []
    for host in ("::1", "me@fe80::1", "me@gpu"):
        Remote(Destination(host), tmp_path, show=shown.append).send(tmp_path, "/d")
    assert [line.rpartition(" ")[2] for line in shown] == ["'[::1]:./'", "'me@[fe80::1]:./'", "me@gpu:./"]


def test_no_shared_connection_where_its_path_is_too_long(tmp_path: Path) -> None:
    shown: list[str] = []
    Remote(Destination("gpu"), tmp_path / ("x" * 90), show=shown.append).run("true")
    assert " -S none " in shown[0]


def test_ctrl_c_says_that_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*arguments: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "run_step", interrupt)
    result = CliRunner().invoke(app, ["deploy", "gpu", "--output", str(tmp_path)])
    assert result.exit_code == 130
    assert "✗ reach the host           interrupted" in result.stdout
    assert "runs on" in result.stderr
