"""A torch.compile backend for tests that ask what was captured."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor


class Recorder:
    """A backend that runs graphs as they are, and counts the calls of ops in them by name."""

    def __init__(self) -> None:
        self.graphs: list[Counter[str]] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        calls = [node.target for node in graph.graph.nodes if node.op == "call_function"]
        self.graphs.append(Counter(str(target) for target in calls))
        return graph.forward

    def count(self, name: str) -> int:
        return sum(number for ops in self.graphs for op, number in ops.items() if name in op)
