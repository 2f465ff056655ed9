"""Amounts of memory: as they are typed, and those of GPUs by name."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

import torch

from flashcore_ops.errors import OptionError

UNITS = {"MB": 10**6, "GB": 10**9, "TB": 10**12, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
# In GB, from NVIDIA's data sheets. What torch reports differs by a few percent either way.
GPU_GB = {
    "A10": 24,
    "A100": 80,
    "A100-40GB": 40,
    "B200": 180,
    "H100": 80,
    "H200": 141,
    "L4": 24,
    "L40S": 48,
    "RTX 3090": 24,
    "RTX 4090": 24,
    "RTX 5090": 32,
}
ASSUMED_GB = 80


@dataclass(frozen=True)
class GpuMemory:
    """A GPU's bytes, and where the figure comes from."""

    num_bytes: int
    source: str


def parse_bytes(text: str, option: str) -> int:
    """The bytes that `text`, a number and a unit, stands for.

    Raises:
        OptionError: naming `option`, for anything else.

    Example:
        >>> parse_bytes("80GB", "--gpu-memory"), parse_bytes("1.5 GiB", "--reserve")
        (80000000000, 1610612736)
    """
    num_bytes = _amount(text)
    if num_bytes is None:
        raise OptionError.explain(
            option,
            expected=f"a number and a unit ({', '.join(UNITS)})",
            got=repr(text),
            fix="Write it like 80GB or 1.5GiB.",
        )
    return num_bytes


def resolve_gpu_memory(text: str | None) -> GpuMemory:
    """The GPU that `text`, an amount or a name in GPU_GB, stands for; None is the first GPU that torch sees.

    Raises:
        OptionError: for any other text.

    Example:
        >>> resolve_gpu_memory("h100")
        GpuMemory(num_bytes=80000000000, source='H100, by its data sheet')
    """
    if text is None:
        return visible_gpu()
    for name, gigabytes in GPU_GB.items():
        if _plain(name) == _plain(text):
            return GpuMemory(gigabytes * UNITS["GB"], f"{name}, by its data sheet")
    num_bytes = _amount(text)
    if num_bytes is None:
        raise OptionError.explain(
            "--gpu-memory",
            expected=f"an amount such as 80GB or 79GiB, or one of {', '.join(GPU_GB)}",
            got=repr(text),
            fix="For another GPU pass its memory.",
        )
    return GpuMemory(num_bytes, "as asked")


def visible_gpu() -> GpuMemory:
    """The first GPU that torch sees, or the amount that is taken where it sees none."""
    if not torch.cuda.is_available():
        return GpuMemory(ASSUMED_GB * UNITS["GB"], "assumed, since torch sees no GPU")
    properties = torch.cuda.get_device_properties(0)
    return GpuMemory(properties.total_memory, f"cuda:0, {properties.name}")


def _plain(name: str) -> str:
    """A GPU's name as it is compared: however it is spaced and cased."""
    return re.sub(r"[\s_-]", "", name).lower()


def _amount(text: str) -> int | None:
    """The bytes of a number and its unit, or None for any other text."""
    factors = {unit.lower(): factor for unit, factor in UNITS.items()}
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]+)", text.strip().lower(), flags=re.ASCII)
    if match is None or match[2] not in factors:
        return None
    return int(Fraction(match[1]) * factors[match[2]])
