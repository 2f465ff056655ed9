"""The `flashcore validate` command, end to end on tiny random models."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from flashcore_ops import model_shapes
from flashcore_ops.cli import app
from flashcore_ops.commands import validate
from flashcore_ops.validation import scenarios

TINY = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
}


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(model_shapes.SHAPES, "tiny", TINY)
    monkeypatch.setattr(scenarios, "SHORT", 6)
    monkeypatch.setattr(scenarios, "LONG", 9)


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["validate", *map(str, arguments)], env={"FORCE_COLOR": None, "COLUMNS": "100"})


def test_all_passed(tmp_path: Path) -> None:
    result = run("--random", "tiny", "--device", "cpu", "--output", tmp_path)
    assert result.exit_code == 0, result.output
    assert "5 of 5 scenarios passed" in result.stdout
    assert result.stderr.count("pass  ") == 5
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["passed"]
    assert report["meta"]["model"] == "tiny, random weights"
    assert {path.name for path in tmp_path.iterdir()} == {"report.json", "report.md", "report.html"}


def test_a_failure_is_exit_status_1_and_reported_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def batch(subject: Any) -> scenarios.Result:
        raise RuntimeError("no memory")

    monkeypatch.setattr(validate, "SCENARIOS", (scenarios.next_token, batch))
    result = run("--random", "tiny", "--device", "cpu", "--output", tmp_path)
    assert result.exit_code == 1
    assert "FAIL  batch: RuntimeError: no memory" in result.stderr
    assert "1 of 2 scenarios passed" in result.stdout
    assert not json.loads((tmp_path / "report.json").read_text())["passed"]


def test_the_baseline_comes_with_its_mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    latency = validate.Latency("FlashCore", 2048, 12.0)
    monkeypatch.setattr(validate, "measure_latencies", lambda subject: [latency])
    monkeypatch.setattr(validate, "SCENARIOS", ())
    result = run("--random", "tiny", "--device", "cpu", "--baseline", "--output", tmp_path)
    assert result.exit_code == 1
    assert "10 ms a token at 2048" in result.stdout
    assert "12.00" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--random", "tiny", "somewhere"], "MODEL and --random: expected one of them, got both. Leave one out."),
        (["--random", "llama-9"], "llama-3.1-8b"),
        (["/no/such/directory"], "MODEL: expected an existing model directory or a hub id such as owner/name"),
        (["--dtype", "int8"], "--dtype: expected auto, float32, bfloat16, float16"),
    ],
)
def test_what_cannot_be_served_says_so(arguments: list[str], text: str, tmp_path: Path) -> None:
    result = run(*arguments, "--output", tmp_path / "none")
    assert result.exit_code == 2
    assert text in result.stderr
    assert not (tmp_path / "none").exists()


def test_a_missing_matplotlib_is_told_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = run("--random", "tiny", "--output", tmp_path)
    assert result.exit_code == 2
    assert "expected matplotlib, for the report's plots" in result.stderr
