"""Packed sequences, told by positions that restart or by bounds: our kernels keep them apart, in every family."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DataCollatorWithFlattening, DynamicCache
from transformers.masking_utils import (
    and_masks,
    causal_mask_function,
    packed_sequence_mask_function,
    sliding_window_causal_mask_function,
)

from flashcore_ops import make_static_cache
from flashcore_ops.errors import MaskError
from flashcore_ops.integrations import attention as integration
from flashcore_ops.integrations.packing import packed_bounds
from flashcore_ops.integrations.transformers import replace_llama_attention_with_flashcore as patch
from tests.integrations.models import (
    CACHES,
    FAMILIES,
    PROMPT_LEN,
    REFERENCES,
    error_bar,
    make_batch,
    make_model,
    static_cache,
)


def packed_positions(*rows: tuple[int, ...], device: str) -> Tensor:
    """`[B, T]` of sequences of the given lengths, one behind the other in each row."""
    return torch.stack([torch.cat([torch.arange(length) for length in row]) for row in rows]).to(device)


@pytest.mark.parametrize("lengths", [((6, 7),), ((1, 5, 7), (13,), (12, 1))], ids=str)
@pytest.mark.parametrize(("family", "implementation"), REFERENCES)
def test_logits_are_as_close_as_hugging_faces(
    family: str, implementation: str, lengths: tuple[tuple[int, ...], ...], device: str
) -> None:
    model = make_model(family, device, implementation=implementation)
    ids = make_batch("single", device)["input_ids"].repeat(len(lengths), 1)
    inputs: dict[str, Any] = {
        "input_ids": ids,
        "position_ids": packed_positions(*lengths, device=device),
        "use_cache": False,
    }
    exact, bar = error_bar(model, model(**inputs).logits, **inputs)
    with warnings.catch_warnings():
        # The dense path would warn.
        warnings.simplefilter("error")
        actual = patch(model)(**inputs).logits
    assert (actual.double() - exact).abs().max() <= bar
    as_one_sequence = model(ids, position_ids=inputs["position_ids"], past_key_values=DynamicCache()).logits
    # transformers 5.17 makes GPT-OSS's masks without its positions, so packed sequences see each other there.
    assert torch.allclose(actual, as_one_sequence) == (family == "gpt-oss")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_in_16_bits_are_as_close_as_hugging_faces(family: str, dtype: torch.dtype, device: str) -> None:
    model, ids = make_model(family, device, dtype), make_batch("single", device)["input_ids"]
    inputs = {"input_ids": ids, "position_ids": packed_positions((6, 7), device=device), "use_cache": False}
    exact, bar = error_bar(model, model(**inputs).logits, **inputs)
    assert (patch(model)(**inputs).logits.double() - exact).abs().max() <= bar


def test_each_sequence_gives_what_it_gives_alone(device: str) -> None:
    model, ids = patch(make_model("llama", device)), make_batch("single", device)["input_ids"]
    packed = model(ids, position_ids=packed_positions((6, 7), device=device), use_cache=False).logits
    for rows in (slice(0, 6), slice(6, PROMPT_LEN)):
        torch.testing.assert_close(packed[:, rows], model(ids[:, rows], use_cache=False).logits)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("family", FAMILIES)
def test_beside_a_cache_positions_that_restart_tell_nothing(family: str, cache: str, device: str) -> None:
    """transformers looks for packed sequences only where there is no cache: these rows are one sequence each, to it
    and to us."""
    model, ids = make_model(family, device), make_batch("single", device)["input_ids"]
    positions = packed_positions((6, 7), device=device)
    exact, bar = error_bar(model, model(ids, position_ids=positions).logits, input_ids=ids, position_ids=positions)
    past = static_cache(model) if cache == "static" else DynamicCache(config=model.config)
    actual = patch(model)(ids, position_ids=positions, past_key_values=past).logits
    assert (actual.double() - exact).abs().max() <= bar


@pytest.mark.parametrize("has_positions", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_bounds_tell_the_sequences(family: str, has_positions: bool, device: str) -> None:
    """As DataCollatorWithFlattening returns them, for GPT-OSS too. Without positions, those of the rows hold."""
    model, ids = make_model(family, device), make_batch("single", device)["input_ids"]
    positions = packed_positions((6, 7) if has_positions else (PROMPT_LEN,), device=device)
    bounds = torch.tensor([0, 6, PROMPT_LEN], device=device, dtype=torch.int32)
    inputs: dict[str, Any] = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 7, "max_length_k": 7}
    if has_positions:
        inputs |= {"position_ids": positions, "use_cache": False}
    alone = []
    for rows in (slice(0, 6), slice(6, PROMPT_LEN)):
        part = {"input_ids": ids[:, rows], "position_ids": positions[:, rows], "use_cache": False}
        alone.append((rows, *error_bar(model, model(**part).logits, **part)))
    logits = patch(model)(ids, **inputs).logits
    for rows, exact, bar in alone:
        assert (logits[:, rows].double() - exact).abs().max() <= bar


def test_what_transformers_collates_is_served(device: str) -> None:
    model, ids = patch(make_model(device=device)), make_batch(device=device)["input_ids"]
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    packed = collate([{"input_ids": part[0].tolist()} for part in ids.split((6, 7), dim=1)])
    batch = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in packed.items()}
    alone = [model(part).logits for part in ids.split((6, 7), dim=1)]
    torch.testing.assert_close(model(**batch).logits, torch.cat(alone, dim=1))


def test_bounds_go_on_from_row_to_row(device: str) -> None:
    model, batch = patch(make_model("llama", device)), make_batch("single", device)
    ids = batch["input_ids"].repeat(2, 1)
    positions = packed_positions((6, 7), (13,), device=device)
    bounds = torch.tensor([0, 6, 13, 26], device=device, dtype=torch.int32)
    told = model(ids, position_ids=positions, use_cache=False, cu_seq_lens_q=bounds).logits
    assert torch.equal(told, model(ids, position_ids=positions, use_cache=False).logits)


BOUNDS = torch.tensor([0, 6, PROMPT_LEN], dtype=torch.int32)


@pytest.mark.parametrize(
    ("arguments", "got"),
    [
        ({"cu_seq_lens_q": BOUNDS.long()}, r"got torch\.int64 \[3\]"),
        ({"cu_seq_lens_q": BOUNDS[None]}, r"got torch\.int32 \[1, 3\]"),
        ({"cu_seq_lens_q": BOUNDS.tolist()}, "got a list"),
        ({"cu_seq_lens_q": BOUNDS[:0]}, r"got torch\.int32 \[0\]"),
        ({"cu_seq_lens_q": BOUNDS, "cu_seq_lens_k": BOUNDS[:2]}, r"another cu_seq_lens_k \[2\]"),
        ({"cu_seq_lens_q": BOUNDS, "cu_seq_lens_k": BOUNDS.tolist()}, "a list as cu_seq_lens_k"),
        ({"cu_seq_lens_q": BOUNDS, "cu_seq_lens_k": BOUNDS.clamp(max=9)}, r"cu_seq_lens_k \[0, 6, 9\] for 13 tokens"),
        ({"cu_seq_lens_q": BOUNDS[:2]}, r"got \[0, 6\] for 13 tokens"),
        ({"cu_seq_lens_q": BOUNDS[1:]}, r"got \[6, 13\] for 13 tokens"),
        ({"cu_seq_lens_q": BOUNDS + BOUNDS.gt(6).int() * 7}, r"got \[0, 6, 20\] for 13 tokens"),
        ({"cu_seq_lens_q": BOUNDS[[0, 2, 1, 2]]}, r"got \[0, 13, 6, 13\] for 13 tokens"),
        ({"cu_seq_lens_q": BOUNDS, "attention_mask": torch.arange(PROMPT_LEN)[None] > 2}, "an attention_mask"),
        ({"cu_seq_lens_q": BOUNDS, "attention_mask": torch.ones(1, PROMPT_LEN)}, "an attention_mask"),
        ({"cu_seq_lens_q": BOUNDS, "attention_mask": torch.ones(1, 1, 13, 13, dtype=torch.bool)}, "an attention_mask"),
    ],
)
def test_malformed_bounds_are_refused(arguments: dict[str, Any], got: str) -> None:
    with pytest.raises(MaskError, match=rf"cu_seq_lens_q: expected int32 \[N \+ 1\].*{got}"):
        patch(make_model())(make_batch()["input_ids"], **arguments)


def test_traced_bounds_that_are_not_the_batches_raise() -> None:
    model, ids = patch(make_model()), make_batch()["input_ids"]
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    compiled(ids, cu_seq_lens_q=BOUNDS, use_cache=False)
    with pytest.raises(RuntimeError, match="cu_seq_lens_q does not rise from 0"):
        compiled(ids, cu_seq_lens_q=BOUNDS.clamp(max=9), use_cache=False)


@pytest.mark.parametrize("cache", CACHES)
def test_bounds_beside_past_tokens_are_refused(cache: str) -> None:
    model, ids = patch(make_model()), make_batch()["input_ids"]
    past = make_static_cache(model, 1, 20) if cache == "static" else DynamicCache()
    model(ids, past_key_values=past)
    bounds = torch.tensor([0, 1], dtype=torch.int32)
    with pytest.raises(MaskError, match=r"cu_seq_lens_q: .*(past tokens, .*|attention_mask) beside it"):
        model(ids[:, :1], past_key_values=past, cu_seq_lens_q=bounds)


NUMBERS = torch.tensor([[0, 0, 1, 1], [0, 0, 0, 0]])


@pytest.mark.parametrize("plain", [causal_mask_function, sliding_window_causal_mask_function(3)])
def test_only_a_plain_mask_within_packed_sequences_is_one(plain: Any) -> None:
    packed = packed_sequence_mask_function(NUMBERS)
    bounds = packed_bounds(and_masks(plain, packed), plain, 4, 4)
    assert bounds is not None
    assert bounds.tolist() == [[[[0, 2, 4, 8]]]]
    others = [
        plain,
        packed,
        and_masks(packed, plain),
        and_masks(plain, packed, packed),
        and_masks(lambda batch, head, query, key: key >= 0, packed),
        and_masks(sliding_window_causal_mask_function(2), packed),
    ]
    assert [packed_bounds(other, plain, 4, 4) for other in others] == [None] * len(others)
    assert packed_bounds(and_masks(plain, packed), plain, q_length=4, kv_length=6) is None


def test_one_call_of_the_op_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def record(*arguments: Any) -> Tensor:
        calls.append(arguments[3].tolist())
        return packed_attention(*arguments)

    packed_attention = integration.packed_attention
    monkeypatch.setattr(integration, "packed_attention", record)
    model, ids = patch(make_model("llama")), make_batch()["input_ids"]
    model(ids, position_ids=packed_positions((6, 7), device="cpu"), use_cache=False)
    assert calls == [[0, 6, PROMPT_LEN]] * len(model.model.layers)
