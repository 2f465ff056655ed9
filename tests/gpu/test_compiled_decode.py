"""torch.compile(mode="reduce-overhead") of a patched model on a GPU: one recorded step serves every length."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import ReinplaceCounters, counters
from torch._inductor.utils import run_and_get_code
from transformers import DynamicCache

from flashcore_ops import make_static_cache
from flashcore_ops.integrations.transformers import replace_llama_attention_with_flashcore as patch
from tests.gpu.recordings import Recordings, count_recordings, num_compiled, num_skips
from tests.integrations.models import FAMILIES, FUSED_FAMILIES, ROUTED_FAMILIES, VOCABULARY, generate, make_model

pytestmark = pytest.mark.gpu

# A prime: its multiples are the sizes of nothing but the cache.
CAPACITY = 509
NUM_STEPS = 64


@pytest.fixture(autouse=True)
def _compiled_anew() -> Iterator[None]:
    """Nothing compiled before is used, since counters count only what is compiled."""
    torch._dynamo.reset()
    counters.clear()
    ReinplaceCounters.clear()
    with torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True):
        yield
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def recordings(monkeypatch: pytest.MonkeyPatch) -> Recordings:
    return count_recordings(monkeypatch)


def make_prompt(batch_size: int, length: int, is_padded: bool = False) -> dict[str, Tensor]:
    """Row i has 2 * i tokens of padding, as far as its length allows, if it is padded."""
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(2, VOCABULARY, (batch_size, length), generator=generator)
    padding = (2 * torch.arange(batch_size)).clamp(max=length - 3) * is_padded
    mask = (torch.arange(length) >= padding[:, None]).long()
    return {"input_ids": (ids * mask).cuda(), "attention_mask": mask.cuda()}


class Decoding:
    """An eager prefill and compiled steps, as the README shows them."""

    def __init__(self, model: Any, step: Any, batch_size: int, capacity: int = CAPACITY) -> None:
        self.model, self.step, self.capacity = model, step, capacity
        self.cache = make_static_cache(model, batch_size, capacity)

    def prefill(self, prompt: dict[str, Tensor], is_padded: bool = False, call: Any = None) -> None:
        self.cache.reset()
        mask, options = prompt["attention_mask"], {}
        self.mask = self.positions = None
        if is_padded:
            # Of fixed width, and the same tensor at each step.
            self.mask = torch.nn.functional.pad(mask, (0, self.capacity - mask.shape[1]), value=1)
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            self.positions = positions[:, -1:]
            options = {"attention_mask": self.mask, "position_ids": positions}
        inputs = {"input_ids": prompt["input_ids"], "past_key_values": self.cache, "logits_to_keep": 1}
        logits = (self.model if call is None else call)(**inputs, **options).logits
        self.tokens = logits[:, -1:].argmax(-1)

    def advance(self) -> Tensor:
        """One step; its logits `[B, V]`, copied out of the graph's memory."""
        options = {}
        if self.mask is not None:
            self.positions = self.positions + 1
            options = {"attention_mask": self.mask, "position_ids": self.positions}
        torch.compiler.cudagraph_mark_step_begin()
        logits = self.step(input_ids=self.tokens, past_key_values=self.cache, **options).logits[:, -1].clone()
        self.tokens = logits.argmax(-1, keepdim=True)
        return logits

    def decode(self, prompt: dict[str, Tensor], num_steps: int = NUM_STEPS, is_padded: bool = False) -> list[list[int]]:
        self.prefill(prompt, is_padded)
        tokens = [self.tokens]
        for _ in range(num_steps):
            self.advance()
            tokens.append(self.tokens)
        return torch.cat(tokens, dim=1).tolist()


def compile_step(model: Any, mode: str | None = "reduce-overhead") -> Any:
    return torch.compile(model, mode=mode, fullgraph=True)


@pytest.mark.parametrize(
    ("family", "batch_size", "is_padded"),
    [
        *((family, batch_size, is_padded) for family in FAMILIES for batch_size, is_padded in ((1, False), (4, True))),
        # The other batches and masks in a family without a window and in one with it.
        *(
            pytest.param(family, batch_size, is_padded, marks=() if family == "llama" else pytest.mark.slow)
            for family in ("llama", "mistral")
            for batch_size, is_padded in ((1, True), (4, False), (32, False), (32, True))
        ),
    ],
)
def test_one_graph_serves_every_length(family: str, batch_size: int, is_padded: bool, recordings: Recordings) -> None:
    model = make_model(family, "cuda")
    prompts = [make_prompt(batch_size, length, is_padded) for length in (13, 40, 5)]
    expected = [generate(model, prompt, max_new_tokens=NUM_STEPS + 1).tolist() for prompt in prompts]
    if family in ROUTED_FAMILIES:
        # As the README says: only in bfloat16 can other products of experts be recorded.
        model.set_experts_implementation("batched_mm")
    decoding = Decoding(patch(model), compile_step(model), batch_size)
    decoding.decode(prompts[0], num_steps=4, is_padded=is_padded)
    num_recorded = recordings.num_graphs
    assert num_recorded > 0
    assert num_compiled() == 1
    with torch._dynamo.config.patch(error_on_recompile=True):
        tokens = [decoding.decode(prompt, is_padded=is_padded) for prompt in prompts]
    assert tokens == expected
    assert recordings.num_graphs == num_recorded
    assert num_compiled() == 1
    assert not counters["graph_break"]
    assert num_skips() == 0
    assert ReinplaceCounters.get_total_missed() == 0


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_compiled_prefill_serves_every_length_too(family: str, recordings: Recordings) -> None:
    """Its length is dynamic, so nothing compiles anew; and what a prefill records never touches the step's graph."""
    model = make_model(family, "cuda")
    prompts = [make_prompt(1, length) for length in (13, 40, 5, 77)]
    expected = [generate(model, prompt, max_new_tokens=9).tolist() for prompt in prompts]
    compiled = compile_step(patch(model))
    decoding = Decoding(model, compiled, batch_size=1)

    def decode(prompt: dict[str, Tensor]) -> list[list[int]]:
        torch._dynamo.mark_dynamic(prompt["input_ids"], 1)
        torch.compiler.cudagraph_mark_step_begin()
        decoding.prefill(prompt, call=compiled)
        tokens, before = [decoding.tokens.clone()], recordings.num_graphs
        for _ in range(8):
            decoding.advance()
            tokens.append(decoding.tokens)
        recorded_by_steps.append(recordings.num_graphs - before)
        return torch.cat(tokens, dim=1).tolist()

    recorded_by_steps: list[int] = []
    decode(prompts[0])
    recorded_by_steps.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert [decode(prompt) for prompt in prompts] == expected
    assert recorded_by_steps == [0, 0, 0, 0]
    assert num_compiled() == 2
    assert num_skips() == 0
    assert ReinplaceCounters.get_total_missed() == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_the_code_makes_and_copies_nothing_as_large_as_a_cache(family: str) -> None:
    model = patch(make_model(family, "cuda"))
    decoding = Decoding(model, compile_step(model), batch_size=3)
    decoding.prefill(make_prompt(3, 13))
    _, codes = run_and_get_code(decoding.advance)
    code = "\n".join(codes)
    assert ("rope_append_attention" if family in FUSED_FAMILIES else "append_kv_") in code
    keys = decoding.cache.layers[0].keys
    sizes = [
        torch.Size(int(size) for size in shape.split(",") if size.strip()).numel()
        for shape in re.findall(r"empty_strided(?:_cuda)?\(\(([\d, ]*)\)", code)
    ]
    assert sizes
    assert max(sizes) < keys.numel()
    # The number of a cache's elements is no stride or size of anything: only a kernel over all of them would name it.
    assert not re.search(rf"\b{keys.numel()}\b", code)


@pytest.mark.parametrize(
    ("family", "dtype", "is_padded"),
    [
        ("llama", torch.float32, False),
        ("llama", torch.bfloat16, True),
        ("mistral", torch.float32, True),
        ("mistral", torch.bfloat16, False),
        *((family, torch.bfloat16, False) for family in ROUTED_FAMILIES),
    ],
    ids=str,
)
def test_replay_is_the_compiled_code_bit_by_bit(
    family: str, dtype: torch.dtype, is_padded: bool, recordings: Recordings
) -> None:
    model, prompt = patch(make_model(family, "cuda", dtype)), make_prompt(4, 13, is_padded)
    results = []
    for mode in ("reduce-overhead", None):
        torch._dynamo.reset()
        decoding = Decoding(model, compile_step(model, mode), batch_size=4)
        decoding.decode(prompt, num_steps=4, is_padded=is_padded)
        decoding.prefill(prompt, is_padded)
        results.append(torch.stack([decoding.advance() for _ in range(NUM_STEPS)]))
    assert recordings.num_graphs > 0
    assert num_skips() == 0
    assert results[0].isfinite().all()
    assert torch.equal(*results)


def test_two_caches_alternate(recordings: Recordings) -> None:
    model = make_model(device="cuda")
    prompts = [make_prompt(2, length) for length in (13, 7)]
    expected = [generate(model, prompt, max_new_tokens=NUM_STEPS + 1).tolist() for prompt in prompts]
    step = compile_step(patch(model))
    decodings = [Decoding(model, step, batch_size=2) for _ in prompts]
    for decoding, prompt in zip(decodings, prompts, strict=True):
        decoding.decode(prompt, num_steps=4)
    num_recorded, compiled = recordings.num_graphs, num_compiled()
    assert compiled <= 2
    for decoding, prompt in zip(decodings, prompts, strict=True):
        decoding.prefill(prompt)
    tokens = [[decoding.tokens] for decoding in decodings]
    for _ in range(NUM_STEPS):
        for decoding, row in zip(decodings, tokens, strict=True):
            decoding.advance()
            row.append(decoding.tokens)
    assert [torch.cat(row, dim=1).tolist() for row in tokens] == expected
    assert (recordings.num_graphs, num_compiled()) == (num_recorded, compiled)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_the_last_slot_is_used_and_what_comes_after_is_nan(family: str) -> None:
    """The context is alive afterwards, and the cache serves again once it is reset."""
    model, prompt = make_model(family, "cuda"), make_prompt(2, 13)
    expected = generate(model, prompt, max_new_tokens=8, past_key_values=DynamicCache()).tolist()
    decoding = Decoding(patch(model), compile_step(model), batch_size=2, capacity=20)
    assert decoding.decode(prompt, num_steps=7) == expected
    assert int(decoding.cache.get_seq_length()) == 20
    before = [(layer.keys.clone(), layer.values.clone()) for layer in decoding.cache.layers]
    for _ in range(3):
        decoding.tokens = torch.full_like(decoding.tokens, 5)
        assert decoding.advance().isnan().all()
    after = [(layer.keys, layer.values) for layer in decoding.cache.layers]
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    torch.cuda.synchronize()
    assert decoding.decode(prompt, num_steps=7) == expected


HOLES = """
import torch
from flashcore_ops import make_static_cache, replace_llama_attention_with_flashcore
from tests.integrations.models import make_model

model = replace_llama_attention_with_flashcore(make_model({family!r}, "cuda"))
step = torch.compile(model, mode="reduce-overhead", fullgraph=True)
cache = make_static_cache(model, 1, 64)
tokens = torch.full((1, 1), 5, device="cuda")
mask = torch.ones(1, 64, dtype=torch.int64, device="cuda")
with torch.no_grad():
    model(tokens.expand(1, 13), past_key_values=cache)
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        step(input_ids=tokens, attention_mask=mask, past_key_values=cache)
    torch.cuda.synchronize()
    print("left padding passes", flush=True)
    mask[0, 4] = 0
    torch.compiler.cudagraph_mark_step_begin()
    step(input_ids=tokens, attention_mask=mask, past_key_values=cache)
    torch.cuda.synchronize()
print("holes pass", flush=True)
"""


@pytest.mark.parametrize("family", ["llama", pytest.param("mistral", marks=pytest.mark.slow)])
def test_a_traced_mask_with_holes_raises(family: str) -> None:
    """In a process of its own, since the device's assertion ends a context."""
    finished = subprocess.run(
        [sys.executable, "-c", HOLES.format(family=family)],
        cwd=Path(__file__).parent.parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "left padding passes" in finished.stdout, finished.stderr[-4000:]
    assert "holes pass" not in finished.stdout
    assert finished.returncode != 0
    assert "assert" in finished.stderr
