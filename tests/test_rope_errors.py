"""Bad input to rope_append_attention raises one typed error with one text: eager, under fake tensors, and compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from flashcore_ops import rope_append_attention
from flashcore_ops.errors import DeviceError, DtypeError, FlashCoreError, GradientError, LayoutError, ShapeError

Arguments = dict[str, Any]


def valid_arguments() -> Arguments:
    return {
        "query": torch.zeros(2, 4, 1, 32),
        "key": torch.zeros(2, 2, 1, 32),
        "value": torch.zeros(2, 2, 1, 16),
        "cos": torch.zeros(2, 1, 32),
        "sin": torch.zeros(1, 1, 32),
        "key_cache": torch.zeros(2, 2, 8, 32),
        "value_cache": torch.zeros(2, 2, 8, 16),
        "kv_range": torch.ones(2, 2, dtype=torch.int32),
    }


def halves() -> Arguments:
    both = torch.zeros(2, 2, 8, 64)
    return {"key_cache": both[..., :32], "value_cache": both[..., 32:48]}


def token_of_cache(name: str) -> Arguments:
    arguments = valid_arguments()
    return {"key_cache": arguments["key_cache"], name: arguments["key_cache"][:, :, :1]}


# What is wrong: what is passed instead, the error, its text.
CASES: dict[str, tuple[Callable[[], Arguments], type[FlashCoreError], str]] = {
    "rank": (
        lambda: {"key_cache": torch.zeros(2, 8, 32)},
        ShapeError,
        "key_cache: expected 4 dims [batch, heads, tokens, head_dim], got 3 dims [2, 8, 32]. "
        "Unsqueeze the missing dims, or use attention_with_kv_cache for [B, T, H*D].",
    ),
    "several query tokens": (
        lambda: {"query": torch.zeros(2, 4, 3, 32)},
        ShapeError,
        "query: expected one token a row, got 3. "
        "Rotate several tokens yourself, append them with append_kv_ and call attention.",
    ),
    "several new tokens": (
        lambda: {"key": torch.zeros(2, 2, 3, 32), "value": torch.zeros(2, 2, 3, 16)},
        ShapeError,
        "key: expected one token a row, got 3. "
        "Rotate several tokens yourself, append them with append_kv_ and call attention.",
    ),
    "no token": (
        lambda: {"query": torch.zeros(2, 4, 0, 32)},
        ShapeError,
        "query: expected one token a row, got 0. "
        "Rotate several tokens yourself, append them with append_kv_ and call attention.",
    ),
    "heads": (
        lambda: {"query": torch.zeros(2, 5, 1, 32)},
        ShapeError,
        "query: expected a number of heads that is a multiple of key's 2, got 5. "
        "Pass query as [B, Hq, Q, D] and key as [B, Hkv, S, D] with Hq = group * Hkv.",
    ),
    "strided next weight": (
        lambda: {"next_weight": torch.zeros(8, 4).t()},
        LayoutError,
        "next_weight: expected a contiguous tensor, got strides [1, 4]. Call .contiguous() on it, or leave it out.",
    ),
    "query's head dim": (
        lambda: {"query": torch.zeros(2, 4, 1, 64)},
        ShapeError,
        "key: expected query's head dim 64, got 32. Project query and key to the same head dim.",
    ),
    "cache's heads": (
        lambda: {"key_cache": torch.zeros(2, 1, 8, 32), "value_cache": torch.zeros(2, 1, 8, 16)},
        ShapeError,
        "key: expected the 1 heads and head dim 32 of key_cache, got 2 heads and head dim 32. "
        "Pass key as [B, Hkv, T, D] with its cache's Hkv and D.",
    ),
    "slots": (
        lambda: {"value_cache": torch.zeros(2, 2, 9, 16)},
        ShapeError,
        "value_cache: expected key_cache's 2 heads and 8 slots, got 2 heads and 9 slots. "
        "Keys and values come in pairs: pass one value for each key.",
    ),
    "cache's batch": (
        lambda: {"key_cache": torch.zeros(3, 2, 8, 32)},
        ShapeError,
        "key_cache: expected query's batch 2, got 3. Pass the same batch for all; expand() a shared one.",
    ),
    "cos with heads": (
        lambda: {"cos": torch.zeros(2, 1, 1, 32)},
        ShapeError,
        "cos: expected shape [2, 1, 32], got [2, 1, 1, 32]. Pass cos as [2, 1, 32].",
    ),
    "half a cos": (
        lambda: {"cos": torch.zeros(2, 1, 16)},
        ShapeError,
        "cos: expected shape [2, 1, 32], got [2, 1, 16]. Pass cos as [2, 1, 32].",
    ),
    "sin's tokens": (
        lambda: {"sin": torch.zeros(1, 2, 32)},
        ShapeError,
        "sin: expected shape [1, 1, 32], got [1, 2, 32]. Pass sin as [1, 1, 32].",
    ),
    "sin's batch": (
        lambda: {"sin": torch.zeros(3, 1, 32)},
        ShapeError,
        "sin: expected shape [2, 1, 32], got [3, 1, 32]. Pass sin as [2, 1, 32].",
    ),
    "cos's dtype": (
        lambda: {"cos": torch.zeros(2, 1, 32, dtype=torch.float16)},
        DtypeError,
        "cos: expected float32, got float16. Cast it with .to(dtype).",
    ),
    "cos's last dim": (
        lambda: {"cos": torch.zeros(2, 1, 64)[..., ::2]},
        LayoutError,
        "cos: expected a contiguous last dim (stride 1), got stride 2. Call .contiguous() on it first.",
    ),
    "cache's dtype": (
        lambda: {"key_cache": torch.zeros(2, 2, 8, 32, dtype=torch.bfloat16)},
        DtypeError,
        "key_cache: expected query's dtype float32, got bfloat16. Cast it with .to(query.dtype).",
    ),
    "kv_range's dtype": (
        lambda: {"kv_range": torch.zeros(2, 2, dtype=torch.int64)},
        DtypeError,
        "kv_range: expected int32, got int64. Cast it with .to(dtype).",
    ),
    "sinks": (
        lambda: {"sinks": torch.zeros(2)},
        ShapeError,
        "sinks: expected shape [4], got [2]. Pass sinks as [4].",
    ),
    "halves of one tensor": (
        halves,
        LayoutError,
        "value_cache: expected memory apart from key_cache's, got a view whose memory range overlaps key_cache's. "
        "Allocate keys and values separately, and clone what comes out of a cache.",
    ),
    "a key out of the cache": (
        lambda: token_of_cache("key"),
        LayoutError,
        "key: expected memory apart from key_cache's, got a view whose memory range overlaps key_cache's. "
        "Allocate keys and values separately, and clone what comes out of a cache.",
    ),
    "a cache for every row": (
        lambda: {"key_cache": torch.zeros(1, 2, 8, 32).expand(2, -1, -1, -1)},
        LayoutError,
        "key_cache: expected every slot to have memory of its own, got strides [0, 256, 32, 1] for sizes "
        "[2, 2, 8, 32]. Allocate the cache with torch.empty or torch.zeros.",
    ),
    "gradients": (
        lambda: {"cos": torch.zeros(2, 1, 32, requires_grad=True)},
        GradientError,
        "flashcore: expected no gradients, since its ops are inference-only, "
        "got an input that requires grad while grad mode is on. Call under torch.no_grad(), or detach the inputs.",
    ),
}
parametrize_cases = pytest.mark.parametrize(("wrong", "error", "text"), CASES.values(), ids=CASES)


@parametrize_cases
def test_eager(wrong, error, text):
    with pytest.raises(error) as raised:
        rope_append_attention(**valid_arguments() | wrong())
    assert str(raised.value) == text
    assert type(raised.value) is error


@parametrize_cases
def test_fake(wrong, error, text):
    with FakeTensorMode(), pytest.raises(error) as raised:
        rope_append_attention(**valid_arguments() | wrong())
    assert str(raised.value) == text
    assert type(raised.value) is error


@parametrize_cases
def test_compiled_keeps_the_text(wrong, error, text):
    torch._dynamo.reset()
    compiled = torch.compile(rope_append_attention, backend="eager", fullgraph=True)
    arguments = valid_arguments() | wrong()
    with pytest.raises(Exception) as raised:  # noqa: PT011  (Dynamo's own class, with our text inside)
        compiled(**arguments)
    assert text in str(raised.value)


@pytest.mark.parametrize("name", ["key", "cos", "sin", "key_cache", "kv_range"])
def test_mixed_devices(name):
    arguments = valid_arguments()
    arguments[name] = arguments[name].to("meta")
    with pytest.raises(DeviceError, match=rf"^{name}: expected query's device cpu, got meta\."):
        rope_append_attention(**arguments)


def test_what_is_refused_writes_nothing():
    arguments = valid_arguments() | {"key": torch.ones(2, 2, 1, 32), "sin": torch.ones(1, 1, 16)}
    with pytest.raises(ShapeError):
        rope_append_attention(**arguments)
    assert (arguments["key_cache"] == 0).all()


def test_inputs_may_require_grad_without_grad_mode():
    arguments = valid_arguments() | {"query": torch.zeros(2, 4, 1, 32, requires_grad=True)}
    with torch.no_grad():
        rope_append_attention(**arguments)
    with torch.inference_mode():
        rope_append_attention(**arguments)
