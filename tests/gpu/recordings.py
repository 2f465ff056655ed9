"""Counts of what a decode step must not do again: compile, and record CUDA graphs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters


@dataclass
class Recordings:
    """CUDA graphs recorded, by torch.compile or by us, since the test began."""

    num_graphs: int = 0


def count_recordings(patcher: pytest.MonkeyPatch) -> Recordings:
    """Counts at the one place through which every capture goes."""
    recordings = Recordings()
    capture_begin = torch.cuda.CUDAGraph.capture_begin

    def counted(self: Any, *args: Any, **kwargs: Any) -> None:
        recordings.num_graphs += 1
        capture_begin(self, *args, **kwargs)

    patcher.setattr(torch.cuda.CUDAGraph, "capture_begin", counted)
    return recordings


def num_compiled() -> int:
    """Graphs that dynamo has made since its last reset."""
    return counters["stats"]["unique_graphs"]


def num_skips() -> int:
    """Graphs that Inductor compiled and would not run as CUDA graphs."""
    return counters["inductor"]["cudagraph_skips"]
