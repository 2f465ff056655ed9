"""The whole suite spreads over processes, unless it is told otherwise."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.conftest import pytest_cmdline_main

WHOLE_SUITE = pytest.Config.ArgsSource.TESTPATHS
SOME_FILES = pytest.Config.ArgsSource.ARGS


@pytest.fixture(autouse=True)
def _large_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    set_memory(monkeypatch, 2**40)


def set_memory(monkeypatch: pytest.MonkeyPatch, num_bytes: int) -> None:
    sizes = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": num_bytes // 4096}
    monkeypatch.setattr(os, "sysconf", sizes.__getitem__)


def spread(args_source: Any = WHOLE_SUITE, **options: int | None) -> int | None:
    """How many processes the option -n of a run asks for afterwards; no options without pytest-xdist."""
    config: Any = SimpleNamespace(args_source=args_source, option=SimpleNamespace(**options))
    config.getoption = lambda name, default: getattr(config.option, name, default)
    pytest_cmdline_main(config)
    return getattr(config.option, "numprocesses", None)


def test_processors_and_memory_bound_the_processes(monkeypatch):
    assert spread(numprocesses=None) == 12
    set_memory(monkeypatch, 17 * 2**30)
    assert spread(numprocesses=None) == 4
    set_memory(monkeypatch, 7 * 2**30)
    assert spread(numprocesses=None) == 0
    set_memory(monkeypatch, 2**40)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert spread(numprocesses=None) == 2


def test_a_gpus_memory_bounds_them_too(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    properties = SimpleNamespace(total_memory=26 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    assert spread(numprocesses=None) == 4


def test_otherwise_nothing_is_spread():
    assert spread(numprocesses=0) == 0
    assert spread(numprocesses=None, args_source=SOME_FILES) is None
    assert spread() is None


def test_a_process_does_not_spread_in_its_turn(monkeypatch):
    """Twelve processes once started twelve each."""
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw0")
    assert spread(numprocesses=None) is None
