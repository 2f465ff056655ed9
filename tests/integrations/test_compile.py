"""torch.compile of a patched model: one graph with one op a layer, and masks that only the device can check."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import DynamicCache

from flashcore_ops.errors import MaskError, OptionError, UnsupportedModelError
from flashcore_ops.integrations.masks import pack_range
from flashcore_ops.integrations.transformers import replace_llama_attention_with_flashcore as patch
from flashcore_ops.integrations.transformers import restore_attention
from tests.integrations.models import (
    FAMILIES,
    PROMPT_LEN,
    ROUTED_FAMILIES,
    generate,
    make_batch,
    make_model,
    static_cache,
)
from tests.integrations.recorder import Recorder
from tests.snapshots import assert_expected_inline

# By default a family with a window and one without; masks are made alike for all.
ONE_OF_EACH_WINDOW = [
    pytest.param(family, marks=() if family in ("llama", "mistral") else pytest.mark.slow) for family in FAMILIES
]
HOLES = torch.tensor([[1, 1, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]])


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_prefill_is_one_graph_with_one_op_a_layer(family: str) -> None:
    model, batch, recorder = patch(make_model(family)), make_batch("left-padded"), Recorder()
    expected = model(**batch, use_cache=False).logits
    actual = torch.compile(model, fullgraph=True, backend=recorder)(**batch, use_cache=False).logits
    torch.testing.assert_close(actual, expected)
    # Names and counts that do not depend on the version of torch.
    ops = ("flashcore.attention", "function linear", "scaled_dot_product_attention", "softmax")
    counts = "".join(f"{op}: {recorder.count(op)}\n" for op in ops)
    assert_expected_inline(
        f"{len(recorder.graphs)} graph\n{counts}",
        """\
1 graph
flashcore.attention: 2
function linear: 15
scaled_dot_product_attention: 0
softmax: 0
""",
    )
    assert recorder.count("_assert_async") >= 1


@pytest.mark.parametrize("cache", ["dynamic", "static", "none"])
@pytest.mark.parametrize(
    ("family", "backend"),
    [
        ("llama", "eager"),
        ("llama", "aot_eager"),
        ("mistral", "aot_eager"),
        ("gemma2", "aot_eager"),
        ("gpt-oss", "aot_eager"),
        *(pytest.param(family, "eager", marks=pytest.mark.slow) for family in FAMILIES if family != "llama"),
    ],
)
def test_compiled_logits_are_those_of_eager(family: str, cache: str, backend: str) -> None:
    """A prefill of 9 tokens and one decode step after it. On a GPU, tests/gpu goes through Inductor instead."""
    model, batch = patch(make_model(family)), make_batch("left-padded")
    compiled = torch.compile(model, fullgraph=True, backend=backend)

    def run(call: Any) -> list[Tensor]:
        make_cache = {"dynamic": DynamicCache(config=model.config), "static": static_cache(model), "none": None}
        past, logits = make_cache[cache], []
        for tokens in (slice(0, 9), slice(9, 10)) if past is not None else (slice(0, 9),):
            inputs = {"input_ids": batch["input_ids"][:, tokens], "past_key_values": past}
            mask = batch["attention_mask"][:, : tokens.stop]
            logits.append(call(**inputs, attention_mask=mask, use_cache=past is not None).logits)
        return logits

    for actual, expected in zip(run(compiled), run(model), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("kind", [pytest.param("single", marks=pytest.mark.slow), "left-padded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_tokens_with_a_dynamic_cache_equal_hugging_faces(family: str, kind: str) -> None:
    """A prompt and two steps behind it; test_compiled_decode does the same with static caches."""
    model, batch = make_model(family), make_batch(kind)
    expected = generate(model, batch, max_new_tokens=3)
    compiled = torch.compile(patch(model), fullgraph=True, backend="eager")
    past, mask, made = DynamicCache(config=model.config), batch["attention_mask"], []
    inputs = {"input_ids": batch["input_ids"], "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    for _ in range(3):
        logits = compiled(**inputs, attention_mask=mask, past_key_values=past).logits
        made.append(logits[:, -1:].argmax(-1))
        inputs = {"input_ids": made[-1], "position_ids": inputs["position_ids"][:, -1:] + 1}
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
    assert torch.cat(made, dim=1).tolist() == expected.tolist()


def test_decoding_with_a_static_cache_does_not_recompile() -> None:
    model, recorder = patch(make_model()), Recorder()
    compiled = torch.compile(model, fullgraph=True, backend=recorder)
    ids, steps = make_batch()["input_ids"], 64
    length = ids.shape[1] + steps
    past, mask = static_cache(model, max_cache_len=length), torch.ones(1, length, dtype=torch.int64)
    model(ids, attention_mask=mask, past_key_values=past)
    for step in range(ids.shape[1], length):
        position = torch.tensor([[step]])
        compiled(ids[:, :1], attention_mask=mask, position_ids=position, past_key_values=past)
    assert int(past.get_seq_length()) == length
    assert len(recorder.graphs) == 1
    assert recorder.count("flashcore.attention") == 2


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("mask", [HOLES, HOLES.flip(1), HOLES * HOLES.flip(1)])
def test_traced_masks_with_holes_raise(mask: Tensor, backend: str) -> None:
    """The graph was made for a good mask: the bad one comes later, and must not slip through it."""
    model, ids = patch(make_model()), make_batch()["input_ids"]
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    compiled(ids, attention_mask=torch.ones_like(mask))
    with pytest.raises(RuntimeError, match="holes"):
        compiled(ids, attention_mask=mask)


@pytest.mark.parametrize("cache", ["dynamic", "static", "none"])
@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_right_padding_equals_hugging_faces(family: str, cache: str) -> None:
    """The rows of tokens, by the kernels, in one graph with any other padding around them."""
    model, right, left, recorder = make_model(family), make_batch("right-padded"), make_batch("left-padded"), Recorder()
    batches = [left, right, right | {"attention_mask": right["attention_mask"].roll(2, 1)}]
    expected = [model(**batch, use_cache=False).logits for batch in batches]
    compiled = torch.compile(patch(model), fullgraph=True, backend=recorder)
    for batch, logits in zip(batches, expected, strict=True):
        make_cache = {"dynamic": DynamicCache(config=model.config), "static": static_cache(model), "none": None}
        past, rows = make_cache[cache], batch["attention_mask"].bool()
        actual = compiled(**batch, past_key_values=past, use_cache=past is not None).logits
        torch.testing.assert_close(actual[rows], logits[rows])
        assert actual[rows].argmax(-1).tolist() == logits[rows].argmax(-1).tolist()
    assert len(recorder.graphs) == 1
    assert recorder.count("scaled_dot_product_attention") == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_right_padded_rows_grow_by_hugging_faces_tokens(family: str) -> None:
    """Greedily, each new token in the place of its row's first padding."""
    model, batch, num_tokens = make_model(family), make_batch("right-padded"), 3
    padding = {"value": 0, "pad": (0, num_tokens)}
    ids, mask = (torch.nn.functional.pad(batch[name], **padding) for name in ("input_ids", "attention_mask"))
    rows, lengths = torch.arange(len(ids)), mask.sum(dim=1)
    alone = [{"input_ids": row[None, :length]} for row, length in zip(ids, lengths, strict=True)]
    expected = [generate(model, prompt, max_new_tokens=num_tokens)[0].tolist() for prompt in alone]
    compiled = torch.compile(patch(model), fullgraph=True, backend="eager")
    for column in range(num_tokens):
        logits = compiled(ids, attention_mask=mask, use_cache=False).logits
        ids[rows, lengths + column] = logits[rows, lengths + column - 1].argmax(-1)
        mask[rows, lengths + column] = 1
    made = [row[length : length + num_tokens].tolist() for row, length in zip(ids, lengths, strict=True)]
    assert made == expected


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_traced_step_behind_right_padding_raises(cache: str) -> None:
    """The padding is a hole by then; and a mask that was not extended for the step hides its tokens."""
    model, batch = patch(make_model()), make_batch("right-padded")
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for width, tokens in ((PROMPT_LEN + 1, 1), (PROMPT_LEN, 1), (PROMPT_LEN + 2, 2)):
        past = static_cache(model) if cache == "static" else DynamicCache(config=model.config)
        compiled(**batch, past_key_values=past)
        mask = torch.nn.functional.pad(batch["attention_mask"], (0, width - PROMPT_LEN), value=1)
        with pytest.raises(RuntimeError, match=r"holes.*run this batch without torch\.compile"):
            compiled(batch["input_ids"][:, :tokens], attention_mask=mask, past_key_values=past)


@pytest.mark.parametrize("family", ONE_OF_EACH_WINDOW)
def test_traced_packed_sequences_raise(family: str) -> None:
    """Not GPT-OSS's: transformers makes its masks without positions, so nothing is packed."""
    model, ids = patch(make_model(family)), make_batch()["input_ids"]
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    positions = torch.arange(13)[None]
    compiled(ids, position_ids=positions, use_cache=False)
    if family == "gpt-oss":
        expected = model(ids, position_ids=positions % 6, use_cache=False).logits
        torch.testing.assert_close(compiled(ids, position_ids=positions % 6, use_cache=False).logits, expected)
        return
    with pytest.raises(RuntimeError, match=r"position_ids restart.*Pass cu_seq_lens_q.*without torch\.compile"):
        compiled(ids, position_ids=positions % 6, use_cache=False)


def _each_alone(model: Any, ids: Tensor, positions: Tensor, lengths: tuple[int, ...]) -> Tensor:
    parts = zip(ids.split(lengths, dim=1), positions.split(lengths, dim=1), strict=True)
    return torch.cat([model(part, position_ids=rows, use_cache=False).logits for part, rows in parts], dim=1)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_compiled_packed_prompt_fills_a_cache(family: str, cache: str) -> None:
    """Of exactly its width, if the cache is static. Both are Hugging Face's."""
    model, ids = make_model(family), make_batch()["input_ids"]
    positions = torch.cat([torch.arange(6), torch.arange(7)])[None]
    expected = _each_alone(model, ids, positions, (6, 7))
    compiled = torch.compile(patch(model), fullgraph=True, backend="eager")
    past = static_cache(model, PROMPT_LEN) if cache == "static" else DynamicCache(config=model.config)
    bounds = torch.tensor([0, 6, 13], dtype=torch.int32)
    actual = compiled(ids, position_ids=positions, cu_seq_lens_q=bounds, past_key_values=past).logits
    torch.testing.assert_close(actual, expected)
    assert actual.argmax(-1).tolist() == expected.argmax(-1).tolist()
    assert int(past.get_seq_length()) == PROMPT_LEN


@pytest.mark.parametrize("has_positions", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_packed_sequences_equal_hugging_faces(family: str, has_positions: bool) -> None:
    """Told by their bounds: each gives the tokens that it gives alone on Hugging Face's, and the logits of eager."""
    model, ids, recorder = make_model(family), make_batch()["input_ids"], Recorder()
    packs = ((6, 7), (4, 4, 5), (1, 9, 2, 1), (12, 1))
    restarting = [torch.cat([torch.arange(length) for length in lengths])[None] for lengths in packs]
    positions = restarting if has_positions else [torch.arange(PROMPT_LEN)[None]] * len(packs)
    alone = [_each_alone(model, ids, rows, lengths) for rows, lengths in zip(positions, packs, strict=True)]
    compiled = torch.compile(patch(model), fullgraph=True, backend=recorder)
    for lengths, rows, expected in zip(packs, positions, alone, strict=True):
        bounds = torch.tensor([0, *lengths]).cumsum(0).int()
        told = {"position_ids": rows} if has_positions else {}
        options = {"cu_seq_lens_q": bounds, "use_cache": False} | told
        actual = compiled(ids, **options).logits
        # Eager's are held to Hugging Face's in test_packing; those are of other shapes, which round otherwise.
        torch.testing.assert_close(actual, model(ids, **options).logits)
        assert actual.argmax(-1).tolist() == expected.argmax(-1).tolist()
    # One for the first number of sequences, and one for any.
    assert len(recorder.graphs) == 2


def test_a_traced_static_cache_that_drops_what_the_window_shows_is_refused() -> None:
    model, ids = patch(make_model("mistral")), make_batch()["input_ids"]
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    past = static_cache(model, max_cache_len=6)
    model(ids[:, :5], past_key_values=past)
    compiled(ids[:, 5:6], past_key_values=past)
    with pytest.raises(RuntimeError, match="room for the 8 tokens of the sliding window"):
        compiled(ids[:, 6:7], past_key_values=past)


@pytest.mark.parametrize("family", ONE_OF_EACH_WINDOW)
def test_traced_4d_masks_take_the_dense_path(family: str) -> None:
    model, ids, recorder = make_model(family), make_batch()["input_ids"], Recorder()
    mask = torch.ones(13, 13, dtype=torch.bool).tril()[None, None]
    mask[..., 3] = False
    mask[..., 0] = True
    added = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    expected = model(ids, attention_mask=added).logits
    with pytest.warns(UserWarning, match="4-D attention mask"):
        actual = torch.compile(patch(model), fullgraph=True, backend=recorder)(ids, attention_mask=mask).logits
    assert recorder.count("flashcore.attention") == 0
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("family", ONE_OF_EACH_WINDOW)
def test_traced_bidirectional_models_take_the_dense_path(family: str) -> None:
    model, batch, recorder = make_model(family), make_batch("left-padded"), Recorder()
    rows = batch["attention_mask"].bool()
    model.config.is_causal = False
    expected = model(**batch, use_cache=False).logits[rows]
    with pytest.warns(UserWarning, match="bidirectional"):
        actual = torch.compile(patch(model), fullgraph=True, backend=recorder)(**batch, use_cache=False).logits[rows]
    assert recorder.count("flashcore.attention") == 0
    torch.testing.assert_close(actual, expected)


def test_int32_masks_are_told_from_the_channel() -> None:
    """`generate` makes masks ahead of a compiled call, and they may have the shape of a caller's."""
    model, ids, recorder = patch(make_model()), make_batch()["input_ids"], Recorder()
    compiled = torch.compile(model, fullgraph=True, backend=recorder)
    ours = pack_range(torch.tensor([4]), end=PROMPT_LEN)
    expected = model(ids, attention_mask=ours, use_cache=False).logits
    torch.testing.assert_close(compiled(ids, attention_mask=ours, use_cache=False).logits, expected)
    assert recorder.count("flashcore.attention") == 2
    for mask in (ours.clone(), torch.ones(1, 1, 1, PROMPT_LEN, dtype=torch.int32)):
        # Dynamo's own error, where it is the tracing that meets the mask.
        with pytest.raises((MaskError, RuntimeError)):
            compiled(ids, attention_mask=mask, use_cache=False)
        with pytest.raises(MaskError, match="int32"):
            torch.compile(model, backend="eager")(ids, attention_mask=mask, use_cache=False)


def test_typed_errors_keep_their_text() -> None:
    compiled = torch.compile(patch(make_model()), backend="eager")
    with pytest.raises((OptionError, RuntimeError), match=r"output_attentions: expected False"):
        compiled(**make_batch(), output_attentions=True)


def test_a_model_that_was_compiled_first_is_compiled_anew() -> None:
    model, batch, recorder = make_model(), make_batch(), Recorder()
    compiled = torch.compile(model, fullgraph=True, backend=recorder)
    expected = compiled(**batch).logits
    assert recorder.count("flashcore.attention") == 0
    patch(model)
    torch.testing.assert_close(compiled(**batch).logits, expected)
    assert recorder.count("flashcore.attention") == 2
    restore_attention(model)
    compiled(**batch)
    assert recorder.count("flashcore.attention") == 2


def test_export_keeps_one_op_a_layer() -> None:
    model, batch = patch(make_model()), make_batch("left-padded")
    program = torch.export.export(model, (), batch | {"use_cache": False}, strict=False)
    ops = [str(node.target) for node in program.graph.nodes]
    assert sum("flashcore.attention" in op for op in ops) == 2
    torch.testing.assert_close(program.module()(**batch, use_cache=False).logits, model(**batch).logits)


def test_torch_jit_trace_is_refused() -> None:
    """It would lose the device's checks: a mask that the trace was not made for would slip through."""
    model, batch = patch(make_model()).requires_grad_(False), make_batch()
    for mask in (None, batch["attention_mask"]):

        def logits(ids: Tensor, mask: Tensor | None = mask) -> Any:
            return model(ids, attention_mask=mask, use_cache=False).logits

        with pytest.raises(UnsupportedModelError, match=r"torch\.jit\.trace: expected torch\.compile"):
            torch.jit.trace(logits, (batch["input_ids"],))


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in ROUTED_FAMILIES])
def test_fake_tensors_have_the_shapes_of_real_ones(family: str) -> None:
    """torch's fake products of experts are for bfloat16 alone, so families with experts are not among these."""
    model, batch = patch(make_model(family)), make_batch("left-padded")
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        ids, mask = (mode.from_tensor(tensor) for tensor in batch.values())
        for inputs in ({}, {"attention_mask": mask}, {"position_ids": mode.from_tensor(torch.arange(13)[None])}):
            assert model(ids, **inputs, use_cache=False).logits.shape == (3, 13, 96)
