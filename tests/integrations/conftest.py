"""Fixtures of the Hugging Face tests: no gradients, one thread, and no record of earlier warnings and masks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from flashcore_ops.integrations import dense, masks


@pytest.fixture(autouse=True)
def _fresh_records(monkeypatch: pytest.MonkeyPatch) -> None:
    """Warnings come once a process, and masks are remembered between calls: each test starts without either."""
    monkeypatch.setattr(dense, "_warned", set())
    monkeypatch.setattr(masks, "_left_padded", {})


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Threads have little to share in models this small, and on busy cores most of a test is their wait.

    For a module, so that it holds for the module's own fixtures as well.
    """
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)
