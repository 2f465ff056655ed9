"""The tiny model, and compilation that does nothing."""

from __future__ import annotations

import pytest
import torch

from bench.models import share
from flashcore_ops.model_shapes import random_model
from tests.bench_llama.tiny import TINY


@pytest.fixture
def compiled(monkeypatch):
    """Compiled implementations run as they are. The options that they were compiled with."""
    options = []

    def compile_nothing(function, **given):
        options.append(given)
        return function

    monkeypatch.setattr(torch, "compile", compile_nothing)
    return options


@pytest.fixture(scope="module")
def models():
    return share("tiny", random_model(TINY, torch.bfloat16, torch.device("cpu")))
