"""Timing without Python's garbage collection."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """No garbage is collected inside, as in the standard library's timeit.

    What torch and transformers import are millions of objects, and a collection goes through all of them. A model's
    eager step makes enough objects for one every few steps, which on a slow host takes longer than the steps.

    Example:
        >>> with uncollected():
        ...     gc.isenabled()
        False
        >>> gc.isenabled()
        True
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
