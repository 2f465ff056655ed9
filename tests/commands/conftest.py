"""Commands' tests give the same on any machine."""

from __future__ import annotations

import pytest

from flashcore_ops.commands import check


@pytest.fixture(autouse=True)
def no_gpu_and_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any machine that runs these tests looks alike."""
    monkeypatch.setattr(check, "collect_gpus", lambda: ())
    monkeypatch.setattr(check, "package_version", lambda name: "3.6.0")
