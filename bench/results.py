"""The results file: what was measured, on what."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol, Self

from bench.harness import Ceilings

DIRECTORY = Path(__file__).parent / "results"


class Case(Protocol):
    """What a benchmark measures under."""

    def to_json(self) -> dict[str, int | str]:
        """The case in a results file, by which its rows are found."""


@dataclass(frozen=True)
class Row:
    """One figure. metric names it and its unit, such as us, tflops or max_abs_err."""

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


def is_failure(skip: Skip) -> bool:
    """Whether FlashCore was wrong or failed, rather than being unable to run the case.

    Example:
        >>> from bench.cases import Case
        >>> is_failure(Skip(Case(batch=1, query_len=1, kv_len=512), "flashcore", "wrong: error 0.3"))
        True
    """
    return skip.impl.startswith("flashcore") and not skip.reason.startswith("cannot run")


@dataclass
class Results:
    """Figures, and why others are missing."""

    rows: list[Row] = field(default_factory=list)
    skips: list[Skip] = field(default_factory=list)

    def __iadd__(self, more: Results) -> Self:
        self.rows += more.rows
        self.skips += more.skips
        return self


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
    directory: Path,
    bench: str,
    meta: dict[str, Any],
    rows: Sequence[Row],
    skips: Sequence[Skip],
    kept: Mapping[str, list[dict[str, Any]]] | None = None,
) -> Path:
    """Writes `<directory>/<gpu>/<bench>.json`, one row a line so that changes read well, and returns its path.

    kept: an earlier run's rows and skips, from `read_mergeable`; what this run measured anew replaces them.

    Raises:
        ValueError: a figure is NaN or infinite.
    """
    new = {"rows": [row.to_json() for row in rows], "skips": [skip.to_json() for skip in skips]}
    merged = new if kept is None else merge(kept, new)
    path = results_path(directory, bench, meta["gpu"])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "{\n"
        f'"meta": {json.dumps(meta, indent=1, allow_nan=False)},\n'
        f'"rows": [\n{_lines(merged["rows"])}\n],\n'
        f'"skips": [\n{_lines(merged["skips"])}\n]\n'
        "}\n"
    )
    return path


def read_mergeable(directory: Path, bench: str, meta: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]] | None:
    """Rows and skips of the results file that is there, if it is of the same GPU, versions and commit; else None.

    A commit that is unknown, or has changes on top, is never the same.
    """
    path = results_path(directory, bench, meta["gpu"])
    if not path.is_file() or meta["commit"] is None or meta["commit"].endswith("-dirty"):
        return None
    earlier = json.loads(path.read_text())
    if any(earlier["meta"].get(name) != meta[name] for name in ("gpu", "torch", "triton", "transformers", "commit")):
        return None
    return {"rows": earlier["rows"], "skips": earlier["skips"]}


def merge(
    kept: Mapping[str, list[dict[str, Any]]], new: Mapping[str, list[dict[str, Any]]]
) -> dict[str, list[dict[str, Any]]]:
    """All new items, after the kept ones of other implementations and cases.

    Example:
        >>> old = {"case": {"S": 1}, "impl": "a", "reason": "failed"}
        >>> row = {"case": {"S": 1}, "impl": "a", "metric": "us", "value": 2.0}
        >>> merge({"rows": [], "skips": [old]}, {"rows": [row], "skips": []})["skips"]
        []
    """
    replaced = {_key(item) for items in new.values() for item in items}
    return {name: [item for item in kept[name] if _key(item) not in replaced] + items for name, items in new.items()}


def results_path(directory: Path, bench: str, gpu: str) -> Path:
    """Where a benchmark's results on a GPU lie."""
    return directory / gpu_slug(gpu) / f"{bench}.json"


def gpu_slug(name: str) -> str:
    """A GPU's name as a directory name.

    Example:
        >>> gpu_slug("NVIDIA H100 80GB HBM3")
        'nvidia-h100-80gb-hbm3'
    """
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _lines(items: Sequence[dict[str, Any]]) -> str:
    return ",\n".join(json.dumps(item, allow_nan=False) for item in items)


def _key(item: Mapping[str, Any]) -> tuple[str, str]:
    return json.dumps(item["case"], sort_keys=True), item["impl"]


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
