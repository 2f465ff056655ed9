"""Lets a model on the CPU keep caches and steps as it does on a GPU, with plain steps in the place of graphs."""

from __future__ import annotations

from typing import Any

import pytest

from flashcore_ops import kept_steps
from flashcore_ops.decode_step import DecodeStep, make_decode_step
from flashcore_ops.integrations import generate
from flashcore_ops.integrations.generate import KeptGeneration


class Ledger:
    """What was made and run since the test began."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, int]] = []
        self.num_runs = 0


def keep_on_cpu(patcher: pytest.MonkeyPatch) -> Ledger:
    """Makes generate take the kept way, and returns the record of it."""
    ledger = Ledger()

    def make(model: Any, cache: Any) -> DecodeStep:
        ledger.shapes.append((cache.batch_size, cache.get_max_length()))
        return make_decode_step(model, cache)

    run = DecodeStep.run

    def counted_run(step: DecodeStep) -> None:
        ledger.num_runs += 1
        run(step)

    patcher.setattr(kept_steps, "make_decode_step", make)
    patcher.setattr(DecodeStep, "run", counted_run)
    patcher.setattr(generate, "_has_graphs", lambda model: True)
    patcher.setattr(KeptGeneration, "_valid_auto_compile_criteria", _is_compiled, raising=False)
    return ledger


def _is_compiled(model: Any, model_kwargs: dict[str, Any], generation_config: Any) -> bool:
    """transformers' own criterion on a GPU, except that what it would compile itself runs as it is."""
    taken = kept_steps.kept_steps(model).taken
    is_kept = taken is not None and model_kwargs.get("past_key_values") is taken.cache
    return is_kept and not generation_config.disable_compile
