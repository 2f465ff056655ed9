"""What bench.llama measures: cases, their bytes and what fits."""

from __future__ import annotations

import doctest
from dataclasses import replace
from importlib import import_module

import pytest
import torch
from transformers import LlamaConfig

from bench.decoders import IMPLEMENTATIONS, ModelForward
from bench.llama_cases import (
    BATCHES,
    LENGTHS,
    MARGIN_BYTES,
    ModelSizes,
    decode_cases,
    prefill_cases,
    why_too_large,
)
from bench.models import LLAMA_3_1_8B
from flashcore_ops.model_shapes import random_model, shape_config
from tests.bench_llama.tiny import SIZES_8B, TINY


@pytest.mark.parametrize("module", ["harness", "llama", "llama_cases", "llama_report", "logits", "report", "results"])
def test_examples(module):
    failed, attempted = doctest.testmod(import_module(f"bench.{module}"))
    assert failed == 0
    assert attempted > 0


def test_sizes_are_those_of_the_8b_shape():
    with torch.device("meta"):
        model = random_model(shape_config(LLAMA_3_1_8B), torch.bfloat16, torch.device("meta"))
    assert ModelSizes.of(model) == SIZES_8B
    short = random_model(shape_config(LLAMA_3_1_8B, num_layers=2), torch.bfloat16, torch.device("meta"))
    assert ModelSizes.of(short).num_layers == 2


def test_sizes_of_tied_weights_count_the_table():
    def sizes(**changes):
        config = LlamaConfig(**(TINY.to_dict() | changes))
        return ModelSizes.of(random_model(config, torch.float32, torch.device("meta")))

    assert sizes(tie_word_embeddings=True).step_weights == sizes().step_weights


def test_floor_counts_weights_rows_and_tokens():
    case = decode_cases("8b", 32, batches=[8], lengths=[2048])[0]
    num_bytes = SIZES_8B.step_weights + 8 * 8192 + 8 * 2048 * 131072
    assert SIZES_8B.floor_ms(case, read_tbs=3.03) == pytest.approx(num_bytes / 3.03e12 * 1e3)
    # Capacity beyond the length costs nothing.
    assert SIZES_8B.floor_ms(replace(case, capacity=8192), read_tbs=3.03) == SIZES_8B.floor_ms(case, read_tbs=3.03)


def test_cases():
    cases = decode_cases("8b", 32, batches=BATCHES, lengths=LENGTHS)
    assert len(set(cases)) == len(BATCHES) * len(LENGTHS) + 1
    roomy = [case for case in cases if case.capacity == 8192]
    assert [(case.batch, case.length, case.shape) for case in roomy] == [(1, 2048, "1 x 2048 in 8192 slots")]
    assert all(case.capacity >= case.length + 64 for case in cases)
    assert decode_cases("8b", 32, batches=[8], lengths=[2048])[-1].capacity == 2112
    assert {case.batch for case in prefill_cases("8b", 32, lengths=[512, 1024])} == {1}


def test_what_fits_on_80_gb():
    free = 62 * 10**9
    fitting = {
        (case.batch, case.length)
        for case in decode_cases("8b", 32, batches=BATCHES, lengths=LENGTHS)
        if why_too_large(SIZES_8B.cache_bytes(case), free) is None
    }
    assert {(8, 32768), (32, 8192)} <= fitting
    assert (32, 32768) not in fitting
    assert why_too_large(free - MARGIN_BYTES, free) is None
    assert why_too_large(free - MARGIN_BYTES + 1, free) is not None


def test_extra_memory():
    case = decode_cases("8b", 32, batches=[8], lengths=[32768])[0]
    cache = SIZES_8B.cache_bytes(case)
    extra = [item.extra_bytes(case, SIZES_8B) for item in IMPLEMENTATIONS]
    # A cache of its own; one layer copied out to all heads; nothing.
    assert extra == [cache, cache // 8, 0, 0, 0]


def test_names_are_unique():
    assert len({item.name for item in IMPLEMENTATIONS}) == len(IMPLEMENTATIONS) == 5
    assert all(isinstance(item, ModelForward) for item in IMPLEMENTATIONS[:4])
