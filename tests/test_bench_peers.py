"""The implementations that bench.attention times: each right where it can run, and honest where it cannot."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend
from torch.nn.attention.bias import CausalBias

from bench.accuracy import make_target, max_abs_error
from bench.attention_runs import judge
from bench.peers import FLASHCORE, IMPLEMENTATIONS, PEERS, SHOWN
from bench.peers import flashinfer as flashinfer_peers
from bench.peers.flashcore import FlashCore, FlashCorePortable
from bench.peers.flashinfer import FlashInferPaged, FlashInferRagged
from bench.peers.flex import FlexAttention, block_mask_of
from bench.peers.sdpa import HuggingFaceStaticCache, Sdpa
from tests import fake_flashinfer
from tests.bench_cases import CHUNK, DECODE, PREFILL, SORTS, generator

MATH = Sdpa("sdpa_math", SDPBackend.MATH)
PACKED = replace(MATH, is_packed=True)
ON_THE_CPU = {
    "flashcore": FLASHCORE,
    "no range": FlashCore("flashcore_no_range", has_range=False),
    "math": MATH,
    "math, lower right": replace(MATH, has_lower_right=True),
    "math, repeated heads": replace(MATH, repeats_heads=True, has_lower_right=True),
    "math, packed": PACKED,
    "static cache": HuggingFaceStaticCache(),
    "flex": FlexAttention(),
}
# What each cannot run, by the sorts of cases.
LEFT_OUT = {
    "no range": {sort for sort in SORTS if sort.startswith("padded")},
    "math, packed": {sort for sort, case in SORTS.items() if not case.is_decode},
    "static cache": {sort for sort, case in SORTS.items() if not case.is_causal},
}


def sets_of(case, number=2):
    source = generator()
    return [case.random_inputs(source) for _ in range(number)]


def check(implementation, case):
    """It is right on each of two input sets; a target per set."""
    sets = sets_of(case)
    calls, error, reason = judge(implementation, sets, make_target(sets[0]))
    assert reason == ""
    assert error > 0
    second = make_target(sets[1])
    assert max_abs_error(calls[1]().flatten(1, -3), second) <= second.bar


@pytest.fixture
def uncompiled(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("sort", SORTS)
@pytest.mark.parametrize("name", ON_THE_CPU)
def test_right_on_the_cpu(name, sort):
    implementation, case = ON_THE_CPU[name], SORTS[sort]
    if sort in LEFT_OUT.get(name, ()):
        assert implementation.why_not(sets_of(case)[0])
    else:
        check(implementation, case)


@pytest.mark.slow
@pytest.mark.parametrize("sort", ["speculative", "padded prefill", "windowed chunk"])
def test_flex_compiles(sort):
    # Its CPU kernels take head dims from 32 on.
    check(FlexAttention(), replace(SORTS[sort], head_dim=64))


def arguments_of(peer, case):
    (arguments,) = peer._arguments(sets_of(case, number=1))
    return arguments


def test_sdpa_has_a_mask_only_where_it_needs_one():
    lower_right = replace(MATH, has_lower_right=True)
    for sort in ("decode", "windowed decode", "non-causal", "non-causal speculative", "prefill"):
        assert arguments_of(MATH, SORTS[sort]).mask is None, sort
    assert [arguments_of(MATH, case).is_causal for case in (DECODE, PREFILL, CHUNK)] == [False, True, False]
    assert isinstance(arguments_of(lower_right, CHUNK).mask, CausalBias)
    assert not isinstance(arguments_of(MATH, CHUNK).mask, CausalBias)
    assert arguments_of(lower_right, SORTS["padded prefill"]).mask.shape == (3, 1, 63, 63)
    assert arguments_of(PACKED, SORTS["speculative"]).mask.shape == (3, 1, 3 * 5, 63)
    assert arguments_of(PACKED, DECODE).query.shape == (3, 2, 3, 16)


def test_a_window_at_decode_is_a_slice():
    arguments = arguments_of(MATH, SORTS["windowed decode"])
    assert arguments.key.shape == arguments.value.shape == (3, 2, 17, 16)


def test_masks_of_alike_sequences_are_one():
    assert arguments_of(MATH, CHUNK).mask.stride(0) == 0
    assert arguments_of(MATH, SORTS["padded prefill"]).mask.stride(0) > 0


def test_the_static_cache_has_a_boolean_mask_over_the_whole_buffer(monkeypatch):
    masks = []
    monkeypatch.setattr(
        "transformers.integrations.sdpa_attention.sdpa_attention_forward",
        lambda layer, query, key, value, mask: (masks.append(mask), [query.transpose(1, 2)])[1],
    )
    for case in (DECODE, PREFILL):
        HuggingFaceStaticCache().prepare(sets_of(case))[0]()
    assert [(mask.dtype, mask.shape) for mask in masks] == [
        (torch.bool, (3, 1, 1, 63)),
        (torch.bool, (3, 1, 63, 63)),
    ]


def test_flex_skips_blocks_that_no_row_sees():
    assert block_mask_of(sets_of(DECODE)[0]) is None
    assert block_mask_of(sets_of(SORTS["non-causal"])[0]) is None
    long = replace(CHUNK, batch=1, query_len=256, kv_len=1024)
    assert block_mask_of(sets_of(long)[0]).kv_num_blocks.sum() == 2
    assert block_mask_of(sets_of(long)[0]).full_kv_num_blocks.tolist() == [[[6, 7]]]
    windowed = block_mask_of(sets_of(replace(long, window=128))[0])
    assert (windowed.kv_num_blocks + windowed.full_kv_num_blocks).tolist() == [[[2, 2]]]


def test_outputs_are_views_of_what_the_backend_gave():
    (call,) = PACKED.prepare(sets_of(DECODE, number=1))
    output = call()
    assert output.shape == (3, 2, 3, 1, 16)
    assert output._base is not None


@pytest.fixture
def fake(monkeypatch):
    """A FlashInfer that runs on the CPU."""
    monkeypatch.setitem(sys.modules, "flashinfer", fake_flashinfer)
    monkeypatch.setattr(flashinfer_peers, "why_not_flashinfer", lambda inputs: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(flashinfer_peers, "WORKSPACE_BYTES", 1)
    fake_flashinfer.CREATED.clear()
    return fake_flashinfer.CREATED


@pytest.mark.parametrize("sort", SORTS)
@pytest.mark.parametrize("peer", [FlashInferPaged(), FlashInferRagged()], ids=lambda peer: peer.name)
def test_flashinfer_gets_what_it_asks_for(fake, peer, sort):
    case = SORTS[sort]
    if case.is_decode == (peer == FlashInferPaged()) and not (case.padding and not case.is_decode):
        check(peer, case)
    else:
        assert peer.why_not(sets_of(case)[0])


def test_flashinfer_runs_its_fastest_kernels(fake):
    for case, peer in (
        (DECODE, FlashInferPaged()),
        (SORTS["speculative"], FlashInferPaged()),
        (CHUNK, FlashInferRagged()),
    ):
        peer.prepare(sets_of(case))
    FlashInferPaged().prepare(sets_of(replace(DECODE, num_query_heads=8)))
    assert fake == [
        {"wrapper": "BatchDecodeWithPagedKVCacheWrapper", "use_tensor_cores": False},
        {"wrapper": "BatchPrefillWithPagedKVCacheWrapper", "backend": "fa2"},
        {"wrapper": "BatchPrefillWithRaggedKVCacheWrapper", "backend": "fa3"},
        {"wrapper": "BatchDecodeWithPagedKVCacheWrapper", "use_tensor_cores": True},
    ]


def test_flashinfer_says_why_not(monkeypatch):
    paged, ragged = FlashInferPaged(), FlashInferRagged()
    decode, prefill = (replace(case, head_dim=128).random_inputs(generator()) for case in (DECODE, PREFILL))
    monkeypatch.setattr(flashinfer_peers, "find_spec", lambda name: None)
    assert "not installed" in paged.why_not(decode)
    assert "not installed" in ragged.why_not(prefill)
    monkeypatch.setattr(flashinfer_peers, "find_spec", lambda name: name)
    assert "needs a GPU" in paged.why_not(decode)
    assert "64, 128, 256" in paged.why_not(SORTS["head dim 96"].random_inputs(generator()))
    monkeypatch.setattr(flashinfer_peers, "why_not_flashinfer", lambda inputs: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert "Hopper" in ragged.why_not(prefill)
    assert paged.why_not(decode) is None


def test_backends_of_a_gpu_say_why_not_on_the_cpu():
    inputs = sets_of(DECODE)[0]
    for peer in PEERS:
        if isinstance(peer, Sdpa):
            assert peer.why_not(inputs)
    assert "GPU" in FlashCorePortable().why_not(sets_of(PREFILL)[0])
    assert "decode" in FlashCorePortable().why_not(inputs)


def test_names():
    names = [item.name for item in IMPLEMENTATIONS]
    assert len(set(names)) == len(names)
    assert set(names) - {item.name for item in SHOWN} == {"flashcore_no_range"}
    assert all(not item.name.startswith("flashcore") for item in PEERS)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("sort", SORTS)
def test_right_on_the_gpu(sort):
    """None is wrong and none of ours fails, at a head dim that all have kernels for."""
    case = replace(SORTS[sort], head_dim=64, kv_len=640)
    case = replace(case, query_len=640) if SORTS[sort].query_len == 63 else case
    source = torch.Generator("cuda").manual_seed(0)
    sets = [case.random_inputs(source) for _ in range(2)]
    target = make_target(sets[0])
    torch._dynamo.reset()
    verdicts = {item.name: judge(item, sets, target)[2] for item in IMPLEMENTATIONS}
    assert verdicts["flashcore"] == ""
    assert verdicts["flashcore_portable"] == (
        "" if case.query_len > 16 else "cannot run: few query tokens are decode's"
    )
    assert not {name: reason for name, reason in verdicts.items() if reason.startswith("wrong")}
