"""Devices: a test that takes `device` runs on the CPU and, marked gpu, on CUDA. And the real model."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from flashcore_ops.default_model import DefaultModelError, default_model_path
from flashcore_ops.errors import MissingDependencyError

DEVICES = [pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.gpu)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "device" in metafunc.fixturenames:
        metafunc.parametrize("device", DEVICES)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(pytest.mark.skip(reason="torch sees no GPU"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def real_model() -> Path:
    """The directory of the default model, fetched on first use; where that fails, tests skip, but fail under CI."""
    try:
        return default_model_path()
    except (DefaultModelError, MissingDependencyError) as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))
