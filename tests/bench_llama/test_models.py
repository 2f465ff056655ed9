"""The plain and the patched twin, and what both are held to."""

from __future__ import annotations

import torch

from bench.models import logits_after
from flashcore_ops import is_patched
from flashcore_ops.model_shapes import random_model
from flashcore_ops.validation.float32 import in_float32
from tests.bench_llama.tiny import TINY


def test_twins_share_weights_and_nothing_else(models):
    assert is_patched(models.patched)
    assert not is_patched(models.plain)
    addresses = [[p.data_ptr() for p in model.parameters()] for model in (models.plain, models.patched)]
    assert addresses[0] == addresses[1]
    assert models.plain.config is not models.patched.config
    assert models.plain.model.layers[0] is not models.patched.model.layers[0]


@torch.no_grad()
def test_float32_model_converts_every_weight(models):
    tokens = torch.arange(6)[None]
    exact = logits_after(in_float32(models.plain), tokens, _empty_past(), num_logits=6)
    whole = random_model(TINY, torch.float32, torch.device("cpu"))
    whole.load_state_dict(models.plain.state_dict())
    torch.testing.assert_close(exact, whole(tokens).logits, rtol=1e-5, atol=1e-5)
    assert {parameter.dtype for parameter in models.plain.parameters()} == {torch.bfloat16}


@torch.no_grad()
def test_past_is_read_and_left_alone(models):
    tokens = torch.arange(10)[None]
    whole = logits_after(models.plain, tokens, _empty_past(), num_logits=4)
    cache = models.plain(tokens[:, :6], use_cache=True).past_key_values
    past = [(layer.keys, layer.values) for layer in cache.layers]
    before = [key.clone() for key, _ in past]
    torch.testing.assert_close(
        logits_after(models.plain, tokens[:, 6:], past, num_logits=4), whole, rtol=0.05, atol=0.1
    )
    assert all(torch.equal(key, old) for (key, _), old in zip(past, before, strict=True))


def _empty_past():
    return [(torch.zeros(1, 2, 0, 16, dtype=torch.bfloat16),) * 2 for _ in range(2)]
