"""Devices: a test that takes `device` runs on the CPU and, marked gpu, on CUDA. And the real model."""

from __future__ import annotations

import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch

from flashcore_ops.default_model import DefaultModelError, default_model_path
from flashcore_ops.errors import MissingDependencyError

# Of every feature that attention has: windows, softcap, sinks, scales.
GPU_FAMILIES = {"llama", "qwen2-window", "gemma2", "gpt-oss"}
# A quarter of the time that a kernel takes to compile goes to its line numbers, which no test reads.
os.environ.setdefault("TRITON_DISABLE_LINE_INFO", "1")

# What one test process may take of a GPU's memory, or of the host's. More of them than this only compile the same
# kernels again.
GPU_PROCESS_BYTES, HOST_PROCESS_BYTES = 6 * 2**30, 4 * 2**30
MAX_PROCESSES = 12

DEVICES = [pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Spreads the whole suite over processes, if pytest-xdist is there: kernels compile on one core each, and most
    tests run on one. `-n` says otherwise."""
    # One of those processes must not spread in its turn.
    is_first = "PYTEST_XDIST_WORKER" not in os.environ
    is_whole_suite = config.args_source is pytest.Config.ArgsSource.TESTPATHS
    has_choice = config.getoption("numprocesses", default=0) is None
    if is_first and is_whole_suite and has_choice:
        num_processes = min(os.cpu_count() or 1, _num_fitting(), MAX_PROCESSES)
        config.option.numprocesses = num_processes if num_processes > 1 else 0


def _num_fitting() -> int:
    """How many test processes have room in memory."""
    num_fitting = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // HOST_PROCESS_BYTES
    if not torch.cuda.is_available():
        return num_fitting
    return min(num_fitting, torch.cuda.get_device_properties(0).total_memory // GPU_PROCESS_BYTES)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "device" in metafunc.fixturenames:
        metafunc.parametrize("device", DEVICES)


@pytest.hookimpl(tryfirst=True)
def pytest_collectreport(report: pytest.CollectReport) -> None:
    """A test file that cannot be imported is an error: the option that forgives it is for the package's examples."""
    if report.skipped and "unable to import module" in str(report.longrepr) and report.nodeid.startswith("tests/"):
        report.outcome = "failed"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    _mark_the_other_dtypes_slow(items)
    _mark_the_other_families_slow(items)
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(pytest.mark.skip(reason="torch sees no GPU"))


def _mark_the_other_dtypes_slow(items: list[pytest.Item]) -> None:
    """Of a GPU test's dtypes one of 16 bits runs by default: all are one code, compiled once more for each.

    float32 runs in the tests that name no dtype.
    """
    cases: dict[str, list[tuple[pytest.Item, torch.dtype]]] = defaultdict(list)
    for item in items:
        dtypes = [value for value in _gpu_parameters(item).values() if isinstance(value, torch.dtype)]
        cases[item.nodeid.partition("[")[0]] += [(item, dtype) for dtype in dtypes]
    for of_one_test in cases.values():
        dtypes = {dtype for _, dtype in of_one_test}
        kept = next((dtype for dtype in (torch.bfloat16, torch.float16) if dtype in dtypes), torch.float32)
        for item, dtype in of_one_test:
            if dtype != kept:
                item.add_marker(pytest.mark.slow)


def _mark_the_other_families_slow(items: list[pytest.Item]) -> None:
    """A GPU test of all families runs by default for four that have every feature: their attention is one kernel's."""
    for item in items:
        family = _gpu_parameters(item).get("family")
        if isinstance(family, str) and family not in GPU_FAMILIES:
            item.add_marker(pytest.mark.slow)


def _gpu_parameters(item: pytest.Item) -> dict[str, Any]:
    """The parameters of a GPU test by name; none of any other test."""
    callspec = getattr(item, "callspec", None)
    return {} if callspec is None or item.get_closest_marker("gpu") is None else callspec.params


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
