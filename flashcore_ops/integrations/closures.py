"""Whether two mask functions of transformers, which are closures, are one."""

from __future__ import annotations

from typing import Any


def is_same_function(function: Any, other: Any) -> bool:
    """Whether two mask functions are one, or closures of the same code over the same values."""
    if isinstance(function, tuple) and isinstance(other, tuple):
        return len(function) == len(other) and all(map(is_same_function, function, other))
    if callable(function) and callable(other):
        code = getattr(function, "__code__", None)
        return function is other or (
            code is not None
            and code is getattr(other, "__code__", None)
            and is_same_function(closed_over(function), closed_over(other))
        )
    return isinstance(function, int) and isinstance(other, int) and function == other


def closed_over(function: Any) -> tuple[Any, ...]:
    """What a closure holds.

    Example:
        >>> from transformers.masking_utils import sliding_window_overlay
        >>> closed_over(sliding_window_overlay(7))
        (7,)
    """
    return tuple(cell.cell_contents for cell in function.__closure__ or ())
