"""torch.compile of a patched model over make_static_cache: two graphs, a prefill's and a step's, for all lengths.

What needs a GPU, such as CUDA graphs, is in tests/gpu/test_compiled_decode.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from flashcore_ops import make_static_cache
from flashcore_ops.integrations.transformers import replace_llama_attention_with_flashcore as patch
from tests.integrations.models import BATCHES, FAMILIES, PROMPT_LEN, VOCABULARY, generate, make_batch, make_model
from tests.integrations.recorder import Recorder
from tests.snapshots import assert_expected_inline

CAPACITY = 96
NUM_STEPS = 64


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Compiled:
    """A patched model, compiled into a recorder, called as a user would with one cache at a time."""

    def __init__(self, family: str = "llama", has_mask: bool = False) -> None:
        self.eager, self.recorder = patch(make_model(family)), Recorder()
        self.model = torch.compile(self.eager, fullgraph=True, backend=self.recorder)
        self.has_mask = has_mask

    def prefill(self, cache: Any, batch: dict[str, Tensor], call: Any = None) -> Tensor:
        """The likeliest next tokens `[B, 1]`."""
        ids, mask = batch["input_ids"], batch["attention_mask"]
        torch._dynamo.mark_dynamic(ids, 1)
        options: dict[str, Tensor] = {}
        if self.has_mask:
            wide = torch.nn.functional.pad(mask, (0, CAPACITY - mask.shape[1]), value=1)
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            torch._dynamo.mark_dynamic(positions, 1)
            options = {"attention_mask": wide, "position_ids": positions}
        logits = (call or self.model)(input_ids=ids, past_key_values=cache, logits_to_keep=1, **options).logits
        return logits[:, -1:].argmax(-1)

    def step(self, cache: Any, tokens: Tensor, mask: Tensor, count: int, call: Any = None) -> Tensor:
        """The token after step `count` from 0."""
        options: dict[str, Tensor] = {}
        if self.has_mask:
            wide = torch.nn.functional.pad(mask, (0, CAPACITY - mask.shape[1]), value=1)
            options = {"attention_mask": wide, "position_ids": mask.sum(-1, keepdim=True) + count}
        logits = (call or self.model)(input_ids=tokens, past_key_values=cache, **options).logits
        return logits[:, -1:].argmax(-1)

    def decode(self, cache: Any, batch: dict[str, Tensor], num_steps: int, call: Any = None) -> list[list[int]]:
        tokens = [self.prefill(cache, batch, call)]
        for count in range(num_steps):
            tokens.append(self.step(cache, tokens[-1], batch["attention_mask"], count, call))
        return torch.cat(tokens, dim=1).tolist()


def prompt(length: int, kind: str = "single") -> dict[str, Tensor]:
    """The last tokens of a batch, or longer prompts without padding."""
    if length <= PROMPT_LEN:
        # In a layout of their own: dynamo compiles a second time for a slice, whose rows lie further apart.
        batch = {name: tensor[:, -length:] for name, tensor in make_batch(kind).items()}
        return {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in batch.items()}
    num_rows = len(make_batch(kind)["input_ids"])
    ids = torch.randint(2, VOCABULARY, (num_rows, length))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("kind", BATCHES)
@pytest.mark.parametrize("family", FAMILIES)
def test_no_length_compiles_anything_new(family: str, kind: str) -> None:
    """One prefill and one step warm up; then 64 steps, and prompts of other lengths, with eager's and sdpa's tokens."""
    plain, batch = make_model(family), prompt(13, kind)
    compiled = Compiled(family, has_mask=kind == "left-padded")
    cache = make_static_cache(compiled.eager, len(batch["input_ids"]), CAPACITY)
    compiled.decode(cache, prompt(9, kind), num_steps=1)
    with torch._dynamo.config.patch(error_on_recompile=True):
        cache.reset()
        tokens = compiled.decode(cache, batch, NUM_STEPS)
        for length in (5, 2, 31):
            cache.reset()
            compiled.decode(cache, prompt(length, kind), num_steps=2)
    assert len(compiled.recorder.graphs) == 2
    assert tokens == generate(plain, batch, max_new_tokens=NUM_STEPS + 1).tolist()


def _ops(recorder: Recorder) -> str:
    names = ("flashcore.linear", "flashcore.rope_append_attention", "flashcore.append_kv_", "flashcore.attention")
    names += ("function linear", "scaled_dot_product_attention", "softmax", "rsqrt", "cat")
    graphs = recorder.graphs
    return "\n".join(
        f"{name}: {' '.join(str(sum(number for op, number in graph.items() if name in op)) for graph in graphs)}"
        for name in names
    )


def test_a_step_has_five_ops_a_layer() -> None:
    """Two layers and the head. A prefill has one append and one attention a layer, the rest is transformers' own."""
    compiled = Compiled()
    compiled.decode(make_static_cache(compiled.eager, 1, CAPACITY), prompt(9), num_steps=1)
    assert_expected_inline(
        _ops(compiled.recorder),
        """\
flashcore.linear: 1 9
flashcore.rope_append_attention: 0 2
flashcore.append_kv_: 2 0
flashcore.attention: 2 0
function linear: 14 0
scaled_dot_product_attention: 0 0
softmax: 0 0
rsqrt: 5 1
cat: 5 1""",
    )


def test_projections_with_biases_stay_as_they_are() -> None:
    compiled = Compiled("qwen2-window")
    compiled.decode(make_static_cache(compiled.eager, 1, CAPACITY), prompt(9), num_steps=1)
    step = compiled.recorder.graphs[1]
    counts = {name: sum(step[op] for op in step if name in op) for name in ("flashcore.linear", "function linear")}
    assert counts == {"flashcore.linear": 2 * 3 + 1, "function linear": 2 * 3}


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_two_caches_alternate_without_a_new_graph(family: str) -> None:
    compiled = Compiled(family)
    caches = [make_static_cache(compiled.eager, 1, CAPACITY) for _ in range(2)]
    batches = [prompt(13), prompt(7)]
    for cache, batch in zip(caches, batches, strict=True):
        compiled.decode(cache, batch, num_steps=1)
        cache.reset()
    tokens = [[compiled.prefill(cache, batch)] for cache, batch in zip(caches, batches, strict=True)]
    with torch._dynamo.config.patch(error_on_recompile=True):
        for count in range(8):
            for row, cache, batch in zip(tokens, caches, batches, strict=True):
                row.append(compiled.step(cache, row[-1], batch["attention_mask"], count))
    assert len(compiled.recorder.graphs) == 2
    expected = [generate(make_model(family), batch, max_new_tokens=9).tolist() for batch in batches]
    assert [torch.cat(row, dim=1).tolist() for row in tokens] == expected


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("family", ["llama", "qwen2-window"])
def test_logits_are_those_of_eager(family: str, backend: str) -> None:
    """aot_eager takes the mutations of the caches out of the graph and puts them back; slots to come hold NaN."""
    model, batch = patch(make_model(family)), make_batch("left-padded")
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    mask = torch.nn.functional.pad(batch["attention_mask"], (0, CAPACITY - PROMPT_LEN), value=1)
    positions = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    results = []
    for call in (compiled, model):
        cache = make_static_cache(model, 3, CAPACITY)
        for layer in cache.layers:
            layer.keys.fill_(torch.nan)
            layer.values.fill_(torch.nan)
        options = {"attention_mask": mask, "past_key_values": cache}
        logits = [call(batch["input_ids"], position_ids=positions, **options).logits[:, -1:]]
        for count in range(1, 4):
            tokens = batch["input_ids"][:, -count, None]
            logits.append(call(tokens, position_ids=positions[:, -1:] + count, **options).logits)
        results.append((torch.cat(logits), [layer.keys for layer in cache.layers]))
    assert results[0][0].isfinite().all()
    torch.testing.assert_close(results[0], results[1], equal_nan=True)


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("is_step", [False, True])
def test_a_traced_mask_with_holes_raises(family: str, is_step: bool) -> None:
    compiled = Compiled(family)
    cache, ids = make_static_cache(compiled.eager, 1, CAPACITY), prompt(9)["input_ids"]
    mask = torch.ones(1, CAPACITY, dtype=torch.int64)
    compiled.model(input_ids=ids, attention_mask=mask, past_key_values=cache)
    if is_step:
        ids = ids[:, :1]
        compiled.model(input_ids=ids, attention_mask=mask, past_key_values=cache)
    mask[0, 4] = 0
    with pytest.raises(RuntimeError, match="holes"):
        compiled.model(input_ids=ids, attention_mask=mask, past_key_values=cache)


def test_the_last_slot_is_used_and_a_bare_step_past_it_drops_its_token() -> None:
    model, batch = patch(make_model()), make_batch()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    cache = make_static_cache(model, 1, PROMPT_LEN + 1)
    model(batch["input_ids"], past_key_values=cache)
    tokens = batch["input_ids"][:, :1]
    assert compiled(tokens, past_key_values=cache).logits.isfinite().all()
    slots = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
    assert compiled(tokens, past_key_values=cache).logits.isnan().all()
    torch.testing.assert_close([(layer.keys, layer.values) for layer in cache.layers], slots, rtol=0, atol=0)
    cache.reset()
    assert compiled(tokens, past_key_values=cache).logits.isfinite().all()


def test_a_traced_prefill_longer_than_the_cache_is_refused_unwritten() -> None:
    model, ids = patch(make_model()), make_batch()["input_ids"]
    cache = make_static_cache(model, 1, 8)
    with pytest.raises((ValueError, RuntimeError), match="room for 13 tokens"):
        torch.compile(model, fullgraph=True, backend="aot_eager")(ids, past_key_values=cache)
    assert int(cache.get_seq_length()) == 0
    assert not cache.layers[0].keys.any()
