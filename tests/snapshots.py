"""expecttest's inline snapshots; where the package is missing, what would compare one is skipped by name."""

from __future__ import annotations

import pytest

try:
    from expecttest import assert_expected_inline
except ImportError:

    def assert_expected_inline(actual: str, expect: str) -> None:
        pytest.skip("expecttest is not installed")


__all__ = ["assert_expected_inline"]
