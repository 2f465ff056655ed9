"""Time and memory of the device that a benchmark runs on."""

from __future__ import annotations

import gc
import time
from typing import Protocol

import torch


class Gauge(Protocol):
    """What a measurement reads."""

    def seconds(self) -> float:
        """The time when all queued work is done."""

    def free_bytes(self) -> int:
        """Memory that could still be allocated, once garbage is collected."""

    def allocated_bytes(self) -> int:
        """Memory that tensors hold."""

    def restart_peak(self) -> None:
        """Starts a new peak."""

    def peak_bytes(self) -> int:
        """The most memory that tensors held since the peak was restarted."""


class CudaGauge:
    """The current GPU."""

    def seconds(self) -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    def free_bytes(self) -> int:
        gc.collect()
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]

    def allocated_bytes(self) -> int:
        return torch.cuda.memory_allocated()

    def restart_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats()

    def peak_bytes(self) -> int:
        return torch.cuda.max_memory_allocated()
