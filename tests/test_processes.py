"""The whole suite spreads over processes on a machine with a GPU, unless it is told otherwise."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.conftest import pytest_cmdline_main

WHOLE_SUITE = pytest.Config.ArgsSource.TESTPATHS
SOME_FILES = pytest.Config.ArgsSource.ARGS


@pytest.fixture
def _gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(total_memory=26 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr("os.cpu_count", lambda: 16)
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)


def spread(args_source: Any = WHOLE_SUITE, **options: int | None) -> int | None:
    """How many processes the option -n of a run asks for afterwards; no options without pytest-xdist."""
    config: Any = SimpleNamespace(args_source=args_source, option=SimpleNamespace(**options))
    config.getoption = lambda name, default: getattr(config.option, name, default)
    pytest_cmdline_main(config)
    return getattr(config.option, "numprocesses", None)


@pytest.mark.usefixtures("_gpu")
def test_the_memory_bounds_the_processes():
    assert spread(numprocesses=None) == 4


@pytest.mark.usefixtures("_gpu")
def test_otherwise_nothing_is_spread(monkeypatch):
    assert spread(numprocesses=0) == 0
    assert spread(numprocesses=None, args_source=SOME_FILES) is None
    assert spread() is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert spread(numprocesses=None) is None


@pytest.mark.usefixtures("_gpu")
def test_a_process_does_not_spread_in_its_turn(monkeypatch):
    """Twelve processes once started twelve each."""
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw0")
    assert spread(numprocesses=None) is None
