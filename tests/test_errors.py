"""Bad input raises one typed error with one text: eager, under fake tensors, and compiled."""

from __future__ import annotations

import pickle
import re
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import flashcore_ops
from flashcore_ops import append_kv_, attention, attention_with_lse, linear, ops
from flashcore_ops.errors import (
    DeviceError,
    DtypeError,
    FlashCoreError,
    GradientError,
    LayoutError,
    MissingDependencyError,
    OptionError,
    ShapeError,
)
from tests.linear_errors import LINEAR_CASES, linear_arguments
from tests.sequence_errors import SEQUENCE_CASES, sequence_arguments

Arguments = dict[str, Any]


def attention_arguments() -> Arguments:
    return {
        "query": torch.zeros(2, 4, 3, 32),
        "key": torch.zeros(2, 2, 8, 32),
        "value": torch.zeros(2, 2, 8, 32),
    }


def append_arguments() -> Arguments:
    return {
        "key_cache": torch.zeros(2, 2, 8, 32),
        "value_cache": torch.zeros(2, 2, 8, 16),
        "key": torch.zeros(2, 2, 1, 32),
        "value": torch.zeros(2, 2, 1, 16),
        "positions": torch.zeros(2, dtype=torch.int64),
    }


def halves() -> Arguments:
    both = torch.zeros(2, 2, 8, 64)
    return {"key_cache": both[..., :32], "value_cache": both[..., 32:48]}


def token_of_cache() -> Arguments:
    cache = torch.zeros(2, 2, 8, 32)
    return {"key_cache": cache, "key": cache[:, :, :1]}


# (what is wrong, what is passed instead, the error, its text)
ATTENTION_CASES: list[tuple[str, Callable[[], Arguments], type[FlashCoreError], str]] = [
    (
        "rank",
        lambda: {"query": torch.zeros(4, 3, 32)},
        ShapeError,
        "query: expected 4 dims [batch, heads, tokens, head_dim], got 3 dims [4, 3, 32]. "
        "Unsqueeze the missing dims, or use attention_with_kv_cache for [B, T, H*D].",
    ),
    (
        "unsupported dtype",
        lambda: {name: tensor.double() for name, tensor in attention_arguments().items()},
        DtypeError,
        "query: expected float16, bfloat16 or float32, got float64. Cast it with .to(dtype).",
    ),
    (
        "mixed dtypes",
        lambda: {"value": torch.zeros(2, 2, 8, 32, dtype=torch.bfloat16)},
        DtypeError,
        "value: expected query's dtype float32, got bfloat16. Cast it with .to(query.dtype).",
    ),
    (
        "batch",
        lambda: {"key": torch.zeros(3, 2, 8, 32)},
        ShapeError,
        "key: expected query's batch 2, got 3. Pass the same batch for all; expand() a shared one.",
    ),
    (
        "head dim",
        lambda: {"key": torch.zeros(2, 2, 8, 64)},
        ShapeError,
        "key: expected query's head dim 32, got 64. Project query and key to the same head dim.",
    ),
    (
        "unsupported head dim",
        lambda: {"value": torch.zeros(2, 2, 8, 20)},
        ShapeError,
        "value: expected a head dim that is a multiple of 8 from 16 to 256, got 20. "
        "Pad the head dim with zeros and pass the unpadded scale.",
    ),
    (
        "heads",
        lambda: {"query": torch.zeros(2, 5, 3, 32)},
        ShapeError,
        "query: expected a number of heads that is a multiple of key's 2, got 5. "
        "Pass query as [B, Hq, Q, D] and key as [B, Hkv, S, D] with Hq = group * Hkv.",
    ),
    (
        "slots",
        lambda: {"value": torch.zeros(2, 2, 9, 32)},
        ShapeError,
        "value: expected key's 2 heads and 8 slots, got 2 heads and 9 slots. "
        "Keys and values come in pairs: pass one value for each key.",
    ),
    (
        "last dim",
        lambda: {"key": torch.zeros(2, 2, 32, 8).transpose(2, 3)},
        LayoutError,
        "key: expected a contiguous last dim (stride 1), got stride 8. Call .contiguous() on it first.",
    ),
    (
        "kv_range shape",
        lambda: {"kv_range": torch.zeros(2, dtype=torch.int32)},
        ShapeError,
        "kv_range: expected shape [2, 2], got [2]. Pass kv_range as [2, 2].",
    ),
    (
        "kv_range batch",
        lambda: {"kv_range": torch.zeros(3, 2, dtype=torch.int32)},
        ShapeError,
        "kv_range: expected shape [2, 2], got [3, 2]. Pass kv_range as [2, 2].",
    ),
    (
        "kv_range dtype",
        lambda: {"kv_range": torch.zeros(2, 2, dtype=torch.int64)},
        DtypeError,
        "kv_range: expected int32, got int64. Cast it with .to(dtype).",
    ),
    (
        "sinks shape",
        lambda: {"sinks": torch.zeros(2)},
        ShapeError,
        "sinks: expected shape [4], got [2]. Pass sinks as [4].",
    ),
    (
        "sinks dtype",
        lambda: {"sinks": torch.zeros(4, dtype=torch.float16)},
        DtypeError,
        "sinks: expected float32, got float16. Cast it with .to(dtype).",
    ),
    (
        "scale",
        lambda: {"scale": float("nan")},
        OptionError,
        "scale: expected a finite number, got nan. Pass None for head_dim ** -0.5.",
    ),
    (
        "negative window",
        lambda: {"window": -1},
        OptionError,
        "window: expected an int >= 0, got -1. Pass 0 for no window.",
    ),
    (
        "window without causal",
        lambda: {"window": 4, "is_causal": False},
        OptionError,
        "window: expected 0 with is_causal=False, got 4. "
        "A window counts back from the row's own column: pass is_causal=True, or window=0.",
    ),
    (
        "negative softcap",
        lambda: {"softcap": -2.0},
        OptionError,
        "softcap: expected a number from 0 to 2**100, got -2.0. Pass 0.0 for no softcap.",
    ),
    (
        "softcap of nan",
        lambda: {"softcap": float("nan")},
        OptionError,
        "softcap: expected a number from 0 to 2**100, got nan. Pass 0.0 for no softcap.",
    ),
    (
        "softcap past float32",
        lambda: {"softcap": 1e39},
        OptionError,
        "softcap: expected a number from 0 to 2**100, got 1e+39. Pass 0.0 for no softcap.",
    ),
    (
        "num_splits",
        lambda: {"num_splits": -1},
        OptionError,
        "num_splits: expected an int >= 0, got -1. Pass 0 to let FlashCore choose.",
    ),
    (
        "gradients",
        lambda: {"query": torch.zeros(2, 4, 3, 32, requires_grad=True)},
        GradientError,
        "flashcore: expected no gradients, since its ops are inference-only, "
        "got an input that requires grad while grad mode is on. Call under torch.no_grad(), or detach the inputs.",
    ),
]

APPEND_CASES: list[tuple[str, Callable[[], Arguments], type[FlashCoreError], str]] = [
    (
        "heads",
        lambda: {"key": torch.zeros(2, 3, 1, 32), "value": torch.zeros(2, 3, 1, 16)},
        ShapeError,
        "key: expected the 2 heads and head dim 32 of key_cache, got 3 heads and head dim 32. "
        "Pass key as [B, Hkv, T, D] with its cache's Hkv and D.",
    ),
    (
        "value's head dim",
        lambda: {"value": torch.zeros(2, 2, 1, 32)},
        ShapeError,
        "value: expected the 2 heads and head dim 16 of value_cache, got 2 heads and head dim 32. "
        "Pass value as [B, Hkv, T, D] with its cache's Hkv and D.",
    ),
    (
        "tokens",
        lambda: {"value": torch.zeros(2, 2, 2, 16)},
        ShapeError,
        "value: expected the 1 tokens of key, got 2. Pass as many new values as new keys.",
    ),
    (
        "dtype",
        lambda: {"key_cache": torch.zeros(2, 2, 8, 32, dtype=torch.float16)},
        DtypeError,
        "key_cache: expected key's dtype float32, got float16. Cast it with .to(key.dtype).",
    ),
    (
        "positions dtype",
        lambda: {"positions": torch.zeros(2)},
        DtypeError,
        "positions: expected int32 or int64, got float32. Cast it with .to(dtype).",
    ),
    (
        "positions shape",
        lambda: {"positions": torch.zeros(1, dtype=torch.int64)},
        ShapeError,
        "positions: expected shape [2], got [1]. Pass positions as [2].",
    ),
    (
        "halves of one tensor",
        halves,
        LayoutError,
        "value_cache: expected memory apart from key_cache's, got a view whose memory range overlaps key_cache's. "
        "Allocate keys and values separately, and clone what comes out of a cache.",
    ),
    (
        "a token out of the cache",
        token_of_cache,
        LayoutError,
        "key: expected memory apart from key_cache's, got a view whose memory range overlaps key_cache's. "
        "Allocate keys and values separately, and clone what comes out of a cache.",
    ),
    (
        "expanded cache",
        lambda: {"key_cache": torch.zeros(1, 2, 8, 32).expand(2, -1, -1, -1)},
        LayoutError,
        "key_cache: expected every slot to have memory of its own, got strides [0, 256, 32, 1] for sizes "
        "[2, 2, 8, 32]. Allocate the cache with torch.empty or torch.zeros.",
    ),
    (
        "cache that overlaps itself",
        lambda: {"key_cache": torch.zeros(1000).as_strided((2, 2, 8, 32), (256, 32, 32, 1))},
        LayoutError,
        "key_cache: expected every slot to have memory of its own, got strides [256, 32, 32, 1] for sizes "
        "[2, 2, 8, 32]. Allocate the cache with torch.empty or torch.zeros.",
    ),
    (
        "gradients",
        lambda: {"key": torch.zeros(2, 2, 1, 32, requires_grad=True)},
        GradientError,
        "flashcore: expected no gradients, since its ops are inference-only, "
        "got an input that requires grad while grad mode is on. Call under torch.no_grad(), or detach the inputs.",
    ),
]
CASES = [
    pytest.param(op, valid, wrong, error, text, id=f"{op.__name__}-{name}")
    for ops, valid, cases in (
        ((attention, attention_with_lse), attention_arguments, ATTENTION_CASES),
        ((attention, attention_with_lse), sequence_arguments, SEQUENCE_CASES),
        ((append_kv_,), append_arguments, APPEND_CASES),
        ((linear,), linear_arguments, LINEAR_CASES),
    )
    for op in ops
    for name, wrong, error, text in cases
]
parametrize_cases = pytest.mark.parametrize(("op", "valid", "wrong", "error", "text"), CASES)


@parametrize_cases
def test_eager(op, valid, wrong, error, text):
    arguments = valid() | wrong()
    with pytest.raises(error) as raised:
        op(**arguments)
    assert str(raised.value) == text
    assert type(raised.value) is error


@parametrize_cases
def test_fake(op, valid, wrong, error, text):
    with FakeTensorMode():
        arguments = valid() | wrong()
        with pytest.raises(error) as raised:
            op(**arguments)
    assert str(raised.value) == text
    assert type(raised.value) is error


@pytest.mark.parametrize(
    ("op", "valid", "wrong", "error", "text"),
    [case for case in CASES if "attention_with_lse" not in str(case.id)],
)
def test_compiled_keeps_the_text(op, valid, wrong, error, text):
    torch._dynamo.reset()
    compiled = torch.compile(op, backend="eager", fullgraph=True)
    arguments = valid() | wrong()
    with pytest.raises(Exception) as raised:  # noqa: PT011  (Dynamo's own class, with our text inside)
        compiled(**arguments)
    assert text in str(raised.value)


@pytest.mark.parametrize("valid", [attention_arguments, append_arguments], ids=["attention", "append_kv_"])
def test_every_tensor_may_require_grad_without_grad_mode(valid):
    arguments = {
        name: tensor.requires_grad_() if tensor.is_floating_point() and not name.endswith("_cache") else tensor
        for name, tensor in valid().items()
    }
    op = attention if "query" in arguments else append_kv_
    with torch.no_grad():
        op(**arguments)
    with torch.inference_mode():
        op(**arguments)


@pytest.mark.parametrize("name", ["key", "value", "kv_range", "sinks"])
@pytest.mark.gpu
def test_mixed_devices(name):
    arguments = {key: tensor.cuda() for key, tensor in attention_arguments().items()}
    arguments |= {"kv_range": torch.zeros(2, 2, dtype=torch.int32).cuda(), "sinks": torch.zeros(4).cuda()}
    arguments[name] = arguments[name].cpu()
    with pytest.raises(DeviceError, match=rf"^{name}: expected query's device cuda:0, got cpu\."):
        attention(**arguments)


@pytest.mark.parametrize("name", ["norm_weight", "residual", "weights[1]"])
@pytest.mark.parametrize("other_device", ["meta", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_mixed_devices_of_linear(name, other_device):
    arguments = linear_arguments()
    if name == "weights[1]":
        arguments["weights"][1] = arguments["weights"][1].to(other_device)
    else:
        arguments[name] = arguments[name].to(other_device)
    with pytest.raises(DeviceError, match=rf"^{re.escape(name)}: expected input's device cpu, got {other_device}"):
        linear(**arguments)


@pytest.mark.parametrize("name", ["key", "kv_range"])
def test_mixed_devices_meta(name):
    arguments = attention_arguments() | {"kv_range": torch.zeros(2, 2, dtype=torch.int32)}
    arguments[name] = arguments[name].to("meta")
    with pytest.raises(DeviceError, match=rf"^{name}: expected query's device cpu, got meta\."):
        attention(**arguments)


def test_a_gpu_without_triton_is_told_to_install_it(monkeypatch):
    monkeypatch.delitem(sys.modules, "flashcore_ops.cuda", raising=False)
    monkeypatch.delattr(flashcore_ops, "cuda", raising=False)
    monkeypatch.setitem(sys.modules, "csrc_free_kernels", None)
    with pytest.raises(
        MissingDependencyError, match=r"^flashcore: expected triton, for tensors on a GPU, got .*3\.6\.$"
    ):
        ops._cuda_kernels()


def test_rejected_append_writes_nothing():
    arguments = append_arguments()
    arguments |= {"key": torch.ones(2, 2, 1, 32), "value": torch.ones(2, 2, 1, 24)}
    with pytest.raises(ShapeError):
        append_kv_(**arguments)
    assert (arguments["key_cache"] == 0).all()
    assert (arguments["value_cache"] == 0).all()


def test_errors_pickle():
    error = ShapeError.explain("key", expected="a", got="b", fix="Do c.")
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy)) == (ShapeError, "key: expected a, got b. Do c.")
