"""bench.tune's search, on a GPU that need not be there."""

from __future__ import annotations

import math

import pytest
import torch
from typer.testing import CliRunner

from bench import tune
from csrc_free_kernels import decode_tuning, linear_tuning
from csrc_free_kernels.decode_tuning import DecodePlan
from csrc_free_kernels.linear_tuning import LinearTiles
from csrc_free_kernels.tuning import Tiles


def shipped(batch: int) -> tune.Choice:
    choice: tune.Choice = {
        kind: linear_tuning.linear_tiles(
            "sm_90",
            torch.bfloat16,
            num_rows=batch,
            num_columns=columns,
            depth=depth,
            num_multiprocessors=132,
            is_aligned=True,
        )
        for kind, (columns, depth) in tune.LINEAR_KINDS.items()
    }
    return choice | {"attention": DecodePlan(Tiles(16, 64, 4, 2), num_splits=33)}


def test_a_candidate_that_cannot_run_is_never_the_best():
    times = {"slow": 2.0, "fails": math.inf, "fast": 1.0}
    ((_, ranked),) = tune.descend({"one": ["slow", "fails", "fast"]}, lambda choice: times[choice["one"]])
    assert [name for _, name in ranked] == ["fast", "slow", "fails"]


@pytest.mark.parametrize("batch", [1, 8, 32])
def test_candidates_start_with_what_is_shipped(batch):
    choice = shipped(batch)
    tried = tune.candidates(choice, batch)
    assert {kind: choices[0] for kind, choices in tried.items()} == choice
    for choices in tried.values():
        assert len(choices) == len(set(choices)) > 1
    for kind in tune.LINEAR_KINDS:
        assert all(isinstance(tiles, LinearTiles) and tiles.block_m >= batch for tiles in tried[kind])


def test_launches_take_the_chosen_tiles():
    choice = shipped(1)
    other = LinearTiles(1, 2, 2048, 2, 1)
    with tune.tuned(choice | {"down": other}):
        for kind, (columns, depth) in tune.LINEAR_KINDS.items():
            tiles = linear_tuning.linear_tiles("sm_90", torch.bfloat16, num_columns=columns, depth=depth)
            assert tiles == (other if kind == "down" else choice[kind])
        assert decode_tuning.plan_decode("sm_90", torch.bfloat16, 128) == choice["attention"]
    with pytest.raises(TypeError):
        decode_tuning.plan_decode("sm_90", torch.bfloat16, 128)


@pytest.mark.gpu
def test_one_kind_on_the_gpu(monkeypatch):
    monkeypatch.setattr(tune, "NUM_LAYERS", 2)
    app = tune.typer.Typer()
    app.command()(tune.main)
    result = CliRunner().invoke(app, ["--kinds", "output", "--length", "256", "--repeats", "2"])
    assert result.exit_code == 0, result.output
    assert "(shipped)" in result.output
