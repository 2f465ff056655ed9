"""Milliseconds that a module prints, run in processes of its own: with the compilers' caches empty, then filled."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from bench.results import Case, Results, Row, Skip

ROOT = Path(__file__).parent.parent
TIMEOUT_SECONDS = 600


def measure_cold_and_warm(module: str, arguments: Sequence[str], case: Case, impl: str) -> Results:
    """Cold, with the compilers' caches empty, then warm, with what the cold run left in them; a process for each.

    Args:
        module: what `python -m` runs. The last line that it prints is its figure.
        impl: whose figure it is.
    """
    results = Results()
    with TemporaryDirectory() as directory:
        caches = {kind: str(Path(directory) / kind) for kind in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")}
        for metric in ("cold_ms", "warm_ms"):
            try:
                figure = _run([sys.executable, "-m", module, *arguments], os.environ | caches)
            except (subprocess.SubprocessError, ValueError, IndexError) as error:
                results.skips.append(Skip(case, impl, f"failed: {_last_line(error)}"))
                break
            results.rows.append(Row(case, impl, metric, figure))
    return results


def _run(command: list[str], environment: dict[str, str]) -> float:
    finished = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True, timeout=TIMEOUT_SECONDS
    )
    return float(finished.stdout.splitlines()[-1])


def _last_line(error: Exception) -> str:
    text = error.stderr if isinstance(error, subprocess.CalledProcessError) else str(error)
    return ((text or "").strip().splitlines() or [type(error).__name__])[-1]
