"""Runs the kernels' own tests in Triton's interpreter, in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.conftest import LAUNCHING

pytest.importorskip("triton")


@pytest.mark.parametrize("file", LAUNCHING)
def test_kernels_in_the_interpreter(file):
    here = Path(__file__).parent
    finished = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(here / file)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=here.parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout[-8000:] + finished.stderr[-2000:]
    assert " passed" in finished.stdout
    assert " skipped" not in finished.stdout
