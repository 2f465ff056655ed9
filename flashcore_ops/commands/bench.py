"""`flashcore bench`: runs a benchmark of the checkout that this package lies in."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from flashcore_ops.errors import MissingDependencyError

# Benchmarks are no part of the package: they import it, and it never imports them.
ROOT = Path(__file__).parent.parent.parent


def run_benchmark(name: str, arguments: Sequence[str]) -> int:
    """Runs `python -m bench.NAME` in a process of its own and gives its exit status.

    Args:
        name: attention or llama.
        arguments: what the benchmark is told.

    Raises:
        MissingDependencyError: the package lies in no checkout.
    """
    if not (ROOT / "bench" / f"{name}.py").is_file():
        raise MissingDependencyError.explain(
            f"flashcore bench {name}",
            expected="FlashCore to lie in a checkout of its repository, beside bench/",
            got=f"{ROOT} without it",
            fix=f"Run `python -m bench.{name}` in a checkout.",
        )
    # -P: the working directory may hold another bench.
    command = [sys.executable, "-P", "-m", f"bench.{name}", *arguments]
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.run(command, env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)}, check=False).returncode
