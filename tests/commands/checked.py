"""Runs `flashcore check` on models that are a config alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from click.testing import Result
from typer.testing import CliRunner

from flashcore_ops.cli import app
from tests.integrations.models import make_model


def run(*arguments: str | Path) -> Result:
    words = ["check", *(str(argument) for argument in arguments)]
    return CliRunner().invoke(app, words, env={"FORCE_COLOR": None, "COLUMNS": "100"})


def shown(result: Result, path: Path) -> str:
    """What the command prints, without the spaces that wrapped lines end in."""
    assert result.stderr == ""
    return "\n".join(line.rstrip() for line in result.stdout.replace(str(path), "MODEL").rstrip().splitlines())


def write_config(path: Path, **settings: Any) -> Path:
    (path / "config.json").write_text(json.dumps(settings))
    return path


def write_llama(path: Path, **settings: Any) -> Path:
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4}
    return write_config(path, **({"model_type": "llama", "num_hidden_layers": 2} | sizes | settings))


def write_family(path: Path, family: str) -> Path:
    make_model(family).config.save_pretrained(path)
    return path
