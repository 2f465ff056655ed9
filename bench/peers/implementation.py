"""What bench.attention asks of an implementation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from bench.cases import Inputs

# One call on tensors that it holds. It gives the output `[B, Hq, Q, D]`, or `[B, Hkv, group, Q, D]` where joining the
# heads would be a copy.
Call = Callable[[], Tensor]


class Implementation(Protocol):
    """One way to compute attention."""

    @property
    def name(self) -> str:
        """As results files and tables call it."""

    def why_not(self, inputs: Inputs) -> str | None:
        """Why it cannot run on such inputs; None if it can."""

    def prepare(self, sets: Sequence[Inputs]) -> list[Call]:
        """A call for each of some input sets of one case.

        What a user of the implementation does once for many calls is done here and not timed: masks, plans, and K and
        V in the layout in which its caches keep them.
        """
