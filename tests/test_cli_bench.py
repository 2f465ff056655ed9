"""`flashcore bench`: a benchmark of the checkout around the package, or one plain line where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from flashcore_ops.cli import app
from flashcore_ops.commands import bench

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("name", ["attention", "llama"])
def test_without_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(bench, "ROOT", tmp_path)
    result = CliRunner().invoke(app, ["bench", name, "--quick"], env={"FORCE_COLOR": None})
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr == (
        f"error: flashcore bench {name}: expected FlashCore to lie in a checkout of its repository, beside bench/, "
        f"got {tmp_path} without it. Run `python -m bench.{name}` in a checkout.\n"
    )


def write_bench(root: Path, text: str) -> None:
    (root / "bench").mkdir(parents=True)
    (root / "bench" / "__init__.py").write_text("")
    (root / "bench" / "attention.py").write_text(text)


def test_arguments_and_status_are_passed_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    write_bench(tmp_path / "checkout", "import sys\nprint(sys.argv[1:])\nsys.exit(7)\n")
    write_bench(tmp_path / "elsewhere", "raise RuntimeError('the wrong one')\n")
    monkeypatch.setattr(bench, "ROOT", tmp_path / "checkout")
    monkeypatch.chdir(tmp_path / "elsewhere")
    words = ["--groups", "decode,prefill", "--output", "here", "-h", "--help"]
    result = CliRunner().invoke(app, ["bench", "attention", *words])
    assert result.exit_code == 7
    assert capfd.readouterr().out == f"{words}\n"


def test_the_benchmarks_are_there() -> None:
    assert bench.ROOT == ROOT
    commands = CliRunner().invoke(app, ["bench", "--help"]).output
    for name in ("attention", "llama"):
        assert (ROOT / "bench" / f"{name}.py").is_file()
        assert f"flashcore bench {name} --help" in " ".join(commands.replace("│", "").split())
