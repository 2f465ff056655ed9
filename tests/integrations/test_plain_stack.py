"""A decode step straight through the layers: the model's own logits, and only where no part is anyone else's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from flashcore_ops import make_static_cache
from flashcore_ops.decode_step import make_decode_step
from flashcore_ops.integrations.plain_stack import decode_logits, is_plain_stack
from flashcore_ops.integrations.transformers import replace_llama_attention_with_flashcore as patch
from tests.integrations.models import FUSED_FAMILIES, PROMPT_LEN, make_batch, make_model


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("family", FUSED_FAMILIES)
def test_equals_the_models_own_forward(family: str, device: str) -> None:
    model, batch = patch(make_model(family, device)), make_batch("left-padded", device)
    assert is_plain_stack(model)
    mask = batch["attention_mask"]
    padding = PROMPT_LEN - mask.sum(-1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    caches = [make_static_cache(model, len(mask), 32) for _ in range(2)]
    for cache in caches:
        model(**batch, position_ids=positions, past_key_values=cache)
    for step in range(1, 4):
        tokens = torch.randint(1, 96, (len(mask), 1), device=device)
        actual = decode_logits(
            model,
            caches[0],
            tokens=tokens,
            start=padding.to(torch.int32),
            position_offset=padding,
            length=caches[0].layers[0].cumulative_length,
        )
        mask = nn.functional.pad(mask, (0, 1), value=1)
        expected = model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions[:, -1:] + step,
            past_key_values=caches[1],
        )
        torch.testing.assert_close(actual, expected.logits[:, -1])
        assert int(caches[0].get_seq_length()) == PROMPT_LEN + step


def _hook(module: nn.Module) -> None:
    module.register_forward_hook(lambda *_: None)


def _own_forward(module: Any) -> None:
    module.forward = module.forward


def _subclass(module: nn.Module) -> None:
    module.__class__ = type("Other", (type(module),), {"forward": lambda self, *args, **kwargs: None})


@pytest.mark.parametrize("change", [_hook, _own_forward, _subclass])
@pytest.mark.parametrize("part", ["", "model", "model.embed_tokens", "model.rotary_emb"])
def test_a_part_of_someone_elses_is_called(part: str, change: Callable[[nn.Module], None]) -> None:
    model = patch(make_model())
    change(model.get_submodule(part))
    assert not is_plain_stack(model)


@pytest.mark.parametrize("change", [_hook, _own_forward])
@pytest.mark.parametrize("part", ["model.norm", "lm_head", "model.layers.1"])
def test_what_others_put_around_the_rest_is_called_too(part: str, change: Callable[[nn.Module], None]) -> None:
    model = patch(make_model())
    calls = []
    module: Any = model.get_submodule(part)
    inner = module.forward
    if change is _hook:
        module.register_forward_hook(lambda *_: calls.append(part))
    else:
        module.forward = lambda *args, **kwargs: (calls.append(part), inner(*args, **kwargs))[1]
    cache = make_static_cache(model, 1, 8)
    zero = torch.zeros(1, dtype=torch.int64)
    decode_logits(
        model,
        cache,
        tokens=torch.ones(1, 1, dtype=torch.int64),
        start=zero.to(torch.int32),
        position_offset=zero,
        length=cache.layers[0].cumulative_length,
    )
    assert calls == [part]


def test_other_heads_are_not_plain() -> None:
    config = make_model().config
    assert not is_plain_stack(LlamaForSequenceClassification(config))
    assert not is_plain_stack(LlamaForCausalLM(config))
    assert is_plain_stack(patch(LlamaForCausalLM(config)))


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_rotations_that_change_with_the_length_are_the_models_own(rope_type: str, device: str) -> None:
    rope: dict[str, Any] = {"rope_type": rope_type, "rope_theta": 10_000.0, "factor": 4.0}
    if rope_type == "longrope":
        factors = {"short_factor": [1.0] * 8, "long_factor": [3.0] * 8, "original_max_position_embeddings": 16}
        rope |= factors
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
    config = LlamaConfig(
        vocab_size=96, **sizes, max_position_embeddings=16, rope_parameters=rope, initializer_range=0.3
    )
    torch.manual_seed(0)
    plain = LlamaForCausalLM(config).eval()
    exact, model = deepcopy(plain).double(), patch(deepcopy(plain).to(device))
    # In two orders of summation on a GPU: in one, little error may be luck.
    plains = [plain, deepcopy(plain).to(device)]
    tokens = torch.randint(1, 96, (1, 28))
    assert not is_plain_stack(model)
    step = make_decode_step(model, make_static_cache(model, 1, 32))
    model(input_ids=tokens[:, :14].to(device), past_key_values=step.cache)
    pasts = [twin(input_ids=tokens[:, :14].to(twin.device)).past_key_values for twin in (exact, *plains)]
    errors: list[list[float]] = []
    # Beyond the length that the frequencies were made for.
    for index in range(14, 28):
        step.tokens.copy_(tokens[:, index : index + 1])
        step.run()
        right, *others = (
            twin(input_ids=tokens[:, index : index + 1].to(twin.device), past_key_values=past).logits[:, -1].cpu()
            for twin, past in zip((exact, *plains), pasts, strict=True)
        )
        errors.append([(logits - right).abs().max().item() for logits in (step.logits.cpu(), *others)])
    step_error, *plain_errors = (max(of_one) for of_one in zip(*errors, strict=True))
    assert step_error <= 2 * max(plain_errors)
