"""Bounds that FlashCore sets itself, and whether a results file keeps them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from bench.figures import Figures

# Two timings of one kernel in one run differ by as much.
NOTHING_MEASURABLE = 1.02


@dataclass(frozen=True)
class Mark:
    """A bound that a figure must keep in each of some cases.

    figure: its value in a case, None where it was not measured.
    at_least, at_most: the bound, on one side.
    """

    claim: str
    cases: Sequence[Any]
    figure: Callable[[Figures, Any], float | None]
    at_least: float = -math.inf
    at_most: float = math.inf

    @property
    def bound(self) -> str:
        return f">= {self.at_least:g}" if self.at_most == math.inf else f"<= {self.at_most:g}"

    def keeps(self, value: float) -> bool:
        """Whether a value is within the bound."""
        return self.at_least <= value <= self.at_most


@dataclass(frozen=True)
class Verdict:
    """What a results file says of a mark: the cases that were measured, with their values, the worst first."""

    mark: Mark
    measured: list[tuple[float, str]]

    @property
    def holds(self) -> bool | None:
        """False if a measured case breaks the bound, None if none does but some were not measured."""
        if not all(self.mark.keeps(value) for value, _ in self.measured):
            return False
        return True if len(self.measured) == len(self.mark.cases) else None


def judge_marks(marks: Sequence[Mark], figures: Figures) -> list[Verdict]:
    """A verdict on each mark."""
    verdicts = []
    for mark in marks:
        values = [(mark.figure(figures, case), str(case)) for case in mark.cases]
        measured = [(value, case) for value, case in values if value is not None]
        verdicts.append(Verdict(mark, sorted(measured, reverse=mark.at_most < math.inf)))
    return verdicts
