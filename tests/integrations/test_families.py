"""The table of families: every row is tested, true of transformers, and says what may be captured."""

from __future__ import annotations

import re
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache
from typer.testing import CliRunner

from flashcore_ops import make_static_cache
from flashcore_ops.cli import app
from flashcore_ops.decode_step import make_decode_step
from flashcore_ops.generation import prefill
from flashcore_ops.integrations.capture import is_capturable
from flashcore_ops.integrations.families import FAMILIES as TABLE
from flashcore_ops.integrations.families import TESTED_TRANSFORMERS, Family, Feature, family_of
from flashcore_ops.integrations.transformers import patch_model
from tests.integrations.models import (
    FAMILIES,
    FUSED_FAMILIES,
    ROUTED_FAMILIES,
    features_of,
    make_batch,
    make_model,
)

ROOT = Path(__file__).parents[2]


def test_every_row_has_a_tested_model_that_uses_its_features() -> None:
    tested: dict[Family, set[Feature]] = {}
    for name in FAMILIES:
        row = family_of(type(make_model(name)))
        assert row is not None
        tested.setdefault(row, set()).update(features_of(name))
    assert tested == {row: set(row.features) for row in TABLE}


@pytest.mark.parametrize("family", TABLE, ids=lambda family: family.name)
def test_the_base_class_is_there(family: Family) -> None:
    module, _, name = family.base_class.rpartition(".")
    assert family_of(getattr(import_module(module), name)) is family


def test_fused_and_routed_families_are_those_of_the_table() -> None:
    assert {name for name in FAMILIES if Feature.FUSED in features_of(name)} == set(FUSED_FAMILIES)
    assert {name for name in FAMILIES if Feature.EXPERTS in features_of(name)} == set(ROUTED_FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_window_reaches_the_layers_that_have_one(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As layer types say; without them every layer has the config's."""
    windows = []
    attention = torch.ops.flashcore.attention

    def record(*args: Any) -> Any:
        windows.append(args[6])
        return attention(*args)

    model = patch_model(make_model(family))
    monkeypatch.setattr(torch.ops.flashcore, "attention", record)
    model(**make_batch(), past_key_values=DynamicCache())
    config = model.config
    window = getattr(config, "sliding_window", None) or 0
    types = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    assert windows == [window if kind == "sliding_attention" else 0 for kind in types]


class HostReads(TorchDispatchMode):
    """Notes what a capture does not allow: numbers that the host looks at, and tensors that it makes of numbers."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "lift_fresh", "is_nonzero", "equal")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._opname in self.FORBIDDEN:
            self.found.append(func._opname)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_that_may_be_captured_reads_nothing_on_the_host(family: str) -> None:
    model, batch = patch_model(make_model(family)), make_batch("left-padded")
    assert is_capturable(model)
    step = make_decode_step(model, make_static_cache(model, batch_size=3, max_cache_len=24))
    prefill(model, step, **batch)
    with HostReads() as reads:
        step.run()
    assert reads.found == []


@pytest.mark.parametrize("family", ROUTED_FAMILIES)
def test_a_step_whose_experts_run_one_by_one_is_not_captured(family: str) -> None:
    model = patch_model(make_model(family))
    model.set_experts_implementation("eager")
    assert not is_capturable(model)
    step = make_decode_step(model, make_static_cache(model, batch_size=1, max_cache_len=24))
    with HostReads() as reads:
        step.run()
    assert reads.found


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_rotations_of_windowed_layers_that_follow_the_length_are_not_captured(rope_type: str) -> None:
    model = patch_model(make_model("gemma3"))
    model.model.rotary_emb.rope_type["full_attention"] = rope_type
    assert not is_capturable(model)


def test_the_tested_version_is_the_one_that_the_tests_run_with() -> None:
    (pinned,) = re.findall(r"^transformers==(.*)$", (ROOT / "constraints/common.txt").read_text(), flags=re.MULTILINE)
    assert TESTED_TRANSFORMERS == pinned == version("transformers")


def test_the_command_prints_every_family_and_the_version() -> None:
    result = CliRunner().invoke(app, ["models"], env={"FORCE_COLOR": None, "COLUMNS": "80"})
    assert result.exit_code == 0, result.output
    first, *lines = result.stdout.splitlines()
    assert first.split() == ["family", "attention", "decode", "step"]
    assert [line.split("  ")[0] for line in lines[: len(TABLE)]] == [family.title for family in TABLE]
    assert re.search(r"^Gemma 2 +window, softcap, own scale +own layers, CUDA graph", result.stdout, flags=re.MULTILINE)
    assert lines[-1].strip() == f"Tested with transformers {TESTED_TRANSFORMERS}."
