"""The results file: what was measured, on what."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from bench.cases import Case
from bench.harness import Ceilings

DIRECTORY = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Row:
    """One figure. metric names its unit: us, tflops or max_abs_err."""

    case: Case
    impl: str
    metric: str
    value: float

    def to_json(self) -> dict[str, Any]:
        # Five digits are more than a timing repeats to.
        value = float(f"{self.value:.5g}")
        return {"case": self.case.to_json(), "impl": self.impl, "metric": self.metric, "value": value}


@dataclass(frozen=True)
class Skip:
    """Why an implementation has no figures for a case."""

    case: Case
    impl: str
    reason: str

    def to_json(self) -> dict[str, Any]:
        return {"case": self.case.to_json(), "impl": self.impl, "reason": self.reason}


def make_meta(gpu: str, ceilings: Ceilings, commit: str | None = None) -> dict[str, Any]:
    """The GPU and its ceilings, the versions that ran, the commit and the time (UTC).

    commit: None asks git.
    """
    return {
        "gpu": gpu,
        **{package: _version(package) for package in ("torch", "triton", "transformers")},
        "commit": _commit() if commit is None else commit,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "ceilings": {name: round(value, 3) for name, value in asdict(ceilings).items()},
    }


def write_results(
    directory: Path, bench: str, meta: dict[str, Any], rows: Sequence[Row], skips: Sequence[Skip]
) -> Path:
    """Writes `<directory>/<gpu>/<bench>.json`, one row a line so that changes read well, and returns its path.

    Raises:
        ValueError: a figure is NaN or infinite.
    """
    path = directory / gpu_slug(meta["gpu"]) / f"{bench}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "{\n"
        f'"meta": {json.dumps(meta, indent=1, allow_nan=False)},\n'
        f'"rows": [\n{_lines(rows)}\n],\n'
        f'"skips": [\n{_lines(skips)}\n]\n'
        "}\n"
    )
    return path


def gpu_slug(name: str) -> str:
    """A GPU's name as a directory name.

    Example:
        >>> gpu_slug("NVIDIA H100 80GB HBM3")
        'nvidia-h100-80gb-hbm3'
    """
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _lines(items: Sequence[Row] | Sequence[Skip]) -> str:
    return ",\n".join(json.dumps(item.to_json(), allow_nan=False) for item in items)


def _version(package: str) -> str | None:
    # torch's own version string carries the CUDA version that its package's lacks.
    if package == "torch":
        import torch

        return torch.__version__
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        finished = subprocess.run(command, cwd=DIRECTORY.parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return finished.stdout.strip()
