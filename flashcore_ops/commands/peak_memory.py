"""Peak memory of a run, measured where the model lives."""

from __future__ import annotations

import resource
import sys

import torch

GIB = 2**30


def start_peak_memory(device: torch.device) -> None:
    """Starts a new peak on a GPU; the CPU's figure always covers the whole process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> str:
    """The peak since the start, with what was measured: allocated GPU memory, or the process's resident set.

    Example:
        >>> peak_memory(torch.device("cpu")).startswith("peak resident memory ")
        True
    """
    if device.type == "cuda":
        return f"peak GPU memory {torch.cuda.max_memory_allocated(device) / GIB:.2f} GiB"
    # The kernel counts in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return f"peak resident memory {peak_bytes / GIB:.2f} GiB"
