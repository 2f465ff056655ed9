"""Tiny subjects, and what makes a patched model wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from flashcore_ops.validation import tokens
from flashcore_ops.validation.subject import Subject
from tests.integrations.models import make_model


def make_subject(dtype: torch.dtype = torch.float32, device: str = "cpu", family: str = "llama") -> Subject:
    return Subject("tiny", make_model(family, device, dtype), tokenizer=None)


def break_patched_models(monkeypatch: pytest.MonkeyPatch, breaks: Callable[[Any], None]) -> None:
    """Has every model that validation patches changed by `breaks`, until it is restored."""
    patch, restore = tokens.patch_model, tokens.restore_attention
    kept: dict[str, torch.Tensor] = {}

    def patch_and_break(model: Any) -> Any:
        kept.update({name: tensor.clone() for name, tensor in model.state_dict().items()})
        breaks(patch(model))
        return model

    def restore_whole(model: Any) -> None:
        restore(model)
        model.load_state_dict(kept)

    monkeypatch.setattr(tokens, "patch_model", patch_and_break)
    monkeypatch.setattr(tokens, "restore_attention", restore_whole)
