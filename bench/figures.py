"""Figures of a results file of bench.attention, by case, and what follows from several of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import geometric_mean
from typing import Any

from bench import results
from bench.cases import Case

FLASHCORE, FLOOR = "flashcore", "floor"


@dataclass(frozen=True)
class Figures:
    """The rows of a results file, by case and by implementation and metric.

    read_tbs: the GPU's measured rate.
    """

    by_case: Mapping[str, Mapping[tuple[str, str], float]]
    read_tbs: float

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> Figures:
        """Takes a results file's content."""
        by_case: dict[str, dict[tuple[str, str], float]] = {}
        for row in content["rows"]:
            by_case.setdefault(_key(row["case"]), {})[row["impl"], row["metric"]] = row["value"]
        return cls(by_case, content["meta"]["ceilings"]["read_tbs"])

    def get(self, case: results.Case, impl: str, metric: str) -> float | None:
        """One figure; None if it is not there."""
        return self._of(case).get((impl, metric))

    def speedup(self, case: results.Case, ours: str = FLASHCORE, peers: Sequence[str] | None = None) -> float | None:
        """How many times as fast as the fastest of some peers, or of all; None without a figure on both sides."""
        times = {impl: value for (impl, metric), value in self._of(case).items() if metric == "us"}
        if peers is None:
            peers = [impl for impl in times if is_peer(impl)]
        return ratio(min((times[peer] for peer in peers if peer in times), default=None), times.get(ours))

    def mean_speedup(self, cases: Sequence[results.Case]) -> float | None:
        """The geometric mean of `speedup` over some cases; None unless each has one."""
        speedups = [speedup for case in cases if (speedup := self.speedup(case)) is not None]
        return geometric_mean(speedups) if len(speedups) == len(cases) > 0 else None

    def read_share(self, case: Case) -> float | None:
        """The rate at which keys and values were read, over the GPU's own."""
        microseconds = self.get(case, FLASHCORE, "us")
        return None if microseconds is None else case.num_kv_bytes / microseconds / 1e6 / self.read_tbs

    def _of(self, case: results.Case) -> Mapping[tuple[str, str], float]:
        return self.by_case.get(_key(case.to_json()), {})


def is_peer(impl: str) -> bool:
    """Whether an implementation is another's.

    Example:
        >>> [impl for impl in ("floor", "flashcore_portable", "sdpa_cudnn") if is_peer(impl)]
        ['sdpa_cudnn']
    """
    return impl != FLOOR and not impl.startswith(FLASHCORE)


def ratio(upper: float | None, lower: float | None) -> float | None:
    """A quotient, None without both.

    Example:
        >>> ratio(3.0, 2.0), ratio(None, 2.0)
        (1.5, None)
    """
    return None if upper is None or lower is None else upper / lower


def _key(case: Mapping[str, Any]) -> str:
    return json.dumps(case, sort_keys=True)
