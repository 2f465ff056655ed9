"""`flashcore check`: what it shows of models that are served, and that it makes no weights."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from csrc_free_kernels import tuning
from csrc_free_kernels.decode_tuning import RingTiles
from csrc_free_kernels.tuning import HopperTiles
from flashcore_ops.commands import check
from flashcore_ops.commands.check import CheckRequest, Target, group_layers, make_report
from flashcore_ops.commands.info import Gpu
from flashcore_ops.commands.kernels import Kernel, describe_tiles
from flashcore_ops.integrations.attention_layers import AttentionLayer, attention_layers
from flashcore_ops.integrations.transformers import patch_model
from flashcore_ops.model_shapes import SHAPES, shape_config
from tests.commands.checked import run, shown, write_family, write_llama
from tests.integrations.models import FAMILIES, FUSED_FAMILIES, make_model
from tests.snapshots import assert_expected_inline

# Where it is missing, GPUs have no kernels to choose from.
pytest.importorskip("triton")

from flashcore_ops import cuda

H100 = Gpu(name="NVIDIA H100 80GB HBM3", architecture="sm_90", memory_gib=79.1, num_sms=132)
A100 = Gpu(name="NVIDIA A100-SXM4-40GB", architecture="sm_80", memory_gib=39.4, num_sms=108)


def kernels_by_operation(path: Path | str, **options: Any) -> dict[str, list[str]]:
    """The kernels for sm_90 of a model whose layers are all served alike."""
    (group,) = make_report(CheckRequest(str(path), gpu="sm_90", **options)).groups
    found: dict[str, list[str]] = {}
    for row in group.kernels:
        if row.tensors_on == "sm_90":
            found.setdefault(row.operation, []).append(row.kernel)
    return found


def test_gemma_2_whose_windows_alternate(tmp_path: Path) -> None:
    result = run(write_family(tmp_path, "gemma2"), "--gpu", "sm_90")
    assert result.exit_code == 0, result.output
    assert_expected_inline(
        shown(result, tmp_path),
        """\
MODEL
  served: Gemma 2 (Gemma2ForCausalLM), in bfloat16

Attention
  layers  heads:KV heads  head dim  scale  window  softcap  sinks
       1             4:2       256   0.25       8        5   none
       1             4:2       256   0.25    none        5   none

Kernels
  cpu    prefill, decode  dense float32    softcap: all scores in memory
  cpu    append           torch copies     new tokens into a static cache
  sm_90  prefill          Triton tiled     over 16 query tokens; sm_90: 128x32 tiles, 8 warps, 3
                                           stages; Gluon for Hopper only in 16 bits, without softcap
  sm_90  decode           Triton split-KV  up to 16 query tokens; sm_90: 16x64 tiles, 8 warps, 3
                                           stages
  sm_90  append           Triton append    new tokens into a static cache

generate
  on a GPU a kept static cache and a captured step, on the CPU Hugging Face's own""",
    )


def test_llama_on_the_cpu_alone(tmp_path: Path) -> None:
    result = run(write_llama(tmp_path, num_key_value_heads=2))
    assert result.exit_code == 0, result.output
    assert_expected_inline(
        shown(result, tmp_path),
        """\
MODEL
  served: Llama (LlamaForCausalLM), in float32

Attention
  layers  heads:KV heads  head dim  scale  window  softcap  sinks
       2             4:2        16   0.25    none     none   none

Kernels
  cpu  prefill, decode  torch SDPA    on the slots that each row sees
  cpu  append           torch copies  new tokens into a static cache

generate
  on a GPU a kept static cache and a captured step, on the CPU Hugging Face's own""",
    )


def test_gpt_oss_on_the_gpus_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "collect_gpus", lambda: (H100, A100, H100))
    result = run(write_family(tmp_path, "gpt-oss"), "--gpu", "sm_90")
    assert result.exit_code == 0, result.output
    assert_expected_inline(
        shown(result, tmp_path),
        """\
MODEL
  served: GPT-OSS (GptOssForCausalLM), in bfloat16

Attention
  layers  heads:KV heads  head dim  scale  window  softcap  sinks
       1             4:2        16   0.25       8     none    yes
       1             4:2        16   0.25    none     none    yes

Kernels
  cuda:0,2  prefill  Gluon for Hopper  over 16 query tokens; sm_90: specialised warps; packed
                                       sequences: Triton tiled
  cuda:0,2  decode   Gluon for Hopper  up to 16 query tokens; sm_90: 16x64 tiles, 4 warps, ring of 5
  cuda:0,2  append   Triton append     new tokens into a static cache
  cuda:1    prefill  Triton tiled      over 16 query tokens; sm_80: 128x128 tiles, 8 warps, 2 stages
  cuda:1    decode   Triton split-KV   up to 16 query tokens; sm_80: 16x32 tiles, 4 warps, 4 stages
  cuda:1    append   Triton append     new tokens into a static cache

generate
  on a GPU a kept static cache and a captured step, on the CPU Hugging Face's own""",
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_served_as_its_layers_ask(family: str, tmp_path: Path) -> None:
    report = make_report(CheckRequest(str(write_family(tmp_path, family)), gpu="sm_90"))
    assert report.refusal is None
    (group,) = report.groups
    assert dict(group.layers) == attention_layers(make_model(family))
    kernels = kernels_by_operation(tmp_path)
    assert kernels["prefill"] == ["Triton tiled" if family == "gemma2" else "Gluon for Hopper"]
    fused = ["Gluon fused decode"] if family in FUSED_FAMILIES else []
    assert kernels["decode"] == ["Triton split-KV" if family == "gemma2" else "Gluon for Hopper", *fused]
    assert kernels["append"] == ["Triton append"]
    assert kernels_by_operation(tmp_path, dtype="float32")["prefill"] == ["Triton tiled"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize(
    "family_settings",
    [{}, {"head_dim": 80}, {"model_type": "gemma2"}, {"model_type": "granite", "attention_multiplier": -0.1}],
    ids=["plain", "head dim 80", "softcap", "negative scale"],
)
def test_the_prefill_kernel_is_the_one_that_is_launched(
    dtype: str, arch: str, family_settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_llama(tmp_path, **family_settings)
    (group,) = make_report(CheckRequest(str(path), dtype=dtype, gpu=arch)).groups
    (row,) = [row for row in group.kernels if (row.tensors_on, row.operation) == (arch, "prefill")]
    monkeypatch.setattr(tuning, "architecture", lambda device: arch)
    monkeypatch.setattr(tuning, "num_multiprocessors", lambda device: 132)
    layer, _ = group.layers[0]
    query = torch.zeros(1, layer.num_query_heads, 32, layer.head_dim, dtype=getattr(torch, dtype))
    tiles = cuda._prefill_tiles(query, query, query, layer.scale, layer.softcap, None)
    assert (row.kernel == "Gluon for Hopper") == isinstance(tiles, HopperTiles)
    if not isinstance(tiles, HopperTiles):
        assert describe_tiles(tiles) in row.reason


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize(
    "family_settings",
    [{}, {"head_dim": 80}, {"head_dim": 72}, {"model_type": "gemma2"}, {"num_attention_heads": 64, "head_dim": 64}],
    ids=["plain", "head dim 80", "head dim 72", "softcap", "64 rows a KV head"],
)
def test_the_decode_kernel_is_the_one_that_is_launched(
    dtype: str, arch: str, family_settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_llama(tmp_path, **{"num_key_value_heads": 1, **family_settings})
    (group,) = make_report(CheckRequest(str(path), dtype=dtype, gpu=arch)).groups
    monkeypatch.setattr(tuning, "architecture", lambda device: arch)
    monkeypatch.setattr(tuning, "num_multiprocessors", lambda device: 132)
    layer, _ = group.layers[0]
    query = torch.zeros(1, layer.num_query_heads, 1, layer.head_dim, dtype=getattr(torch, dtype))
    cache = torch.zeros(1, layer.num_kv_heads, 8192, layer.head_dim, dtype=query.dtype)
    tiles = cuda._plan_decode(query, cache, cache, layer.scale, layer.softcap, num_splits=0).tiles
    rows = [row for row in group.kernels if (row.tensors_on, row.operation) == (arch, "decode")]
    assert rows
    for row in rows:
        assert row.kernel.startswith("Gluon") == isinstance(tiles, RingTiles)
        assert describe_tiles(tiles) in row.reason


def test_without_triton_gpus_have_no_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "package_version", lambda name: None)
    assert kernels_by_operation(write_llama(tmp_path)) == {"all": ["none: every call raises"]}


def test_attention_in_both_directions_takes_the_dense_path(tmp_path: Path) -> None:
    result = run(write_llama(tmp_path, is_causal=False))
    assert result.exit_code == 0, result.output
    assert "cpu  all  dense path  attention in both directions; torch SDPA with a boolean mask" in result.stdout
    assert "\ngenerate" not in result.stdout


def test_layers_that_other_kernels_serve_stand_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, capped = (
        AttentionLayer(4, 2, 64, 0.1, window=0, softcap=softcap, has_sinks=False, is_causal=True)
        for softcap in (0.0, 5.0)
    )
    windowed = AttentionLayer(4, 2, 64, 0.1, window=8, softcap=0.0, has_sinks=False, is_causal=True)
    layers = Counter({plain: 3, capped: 2, windowed: 1})
    monkeypatch.setattr(check, "attention_layers", lambda model: layers)
    target = Target(dtype=torch.bfloat16, has_cpu=True, gpus={})
    first, second = group_layers(make_model(), target)
    assert first.layers == ((plain, 3), (windowed, 1))
    assert second.layers == ((capped, 2),)
    assert second.kernels[0] == Kernel("cpu", "prefill, decode", "dense float32", "softcap: all scores in memory")


KEPT = "on a GPU a kept static cache and a captured step, on the CPU Hugging Face's own"


@pytest.mark.parametrize(
    ("settings", "generation", "text"),
    [
        ({}, None, KEPT),
        ({}, {"do_sample": True, "temperature": 0.7}, KEPT),
        # transformers itself unsets what Gemma 2 was published with.
        ({}, {"cache_implementation": "hybrid"}, KEPT),
        ({}, {"cache_implementation": "static"}, "cache_implementation, by the model's generation settings"),
        ({}, {"num_beams": 4}, "beam_search, by the model's generation settings"),
        ({"num_beams": 4}, None, "beam_search, by the model's generation settings"),
        ({"use_cache": False}, None, "use_cache=False, by the model's generation settings"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}},
            None,
            "Hugging Face's own caches and steps: rotary frequencies that the host chooses by the length",
        ),
        (
            {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
            None,
            f"{KEPT} The checkpoint is quantized: with its own layers, a GPU may stay Hugging Face's too.",
        ),
    ],
)
def test_how_it_generates(
    settings: dict[str, Any], generation: dict[str, Any] | None, text: str, tmp_path: Path
) -> None:
    write_llama(tmp_path, **settings)
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    result = run(tmp_path)
    assert result.exit_code == 0, result.output
    assert " ".join(result.stdout.split("\ngenerate\n")[1].split()).endswith(text)


def test_settings_in_a_config_alone_count_too(tmp_path: Path) -> None:
    file = write_llama(tmp_path, num_beams=4) / "config.json"
    assert make_report(CheckRequest(str(file))).obstacle == "beam_search, by the model's generation settings"


class SmallTensorsOnly(TorchDispatchMode):
    """Refuses every tensor with memory of its own that could hold a layer's weights."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, torch.Tensor) and leaf.device.type != "meta":
                assert leaf.nbytes < 2**16, f"{func} made {leaf.nbytes} bytes on {leaf.device}"
        return output


@pytest.mark.parametrize("name", ["llama-3.1-8b", "llama-3.1-70b"])
def test_no_weights_are_made(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outlines = []

    def patch(model: Any) -> Any:
        outlines.append(model)
        return patch_model(model)

    monkeypatch.setattr(check, "patch_model", patch)
    shape_config(name).save_pretrained(tmp_path)
    start = time.perf_counter()
    with SmallTensorsOnly():
        report = make_report(CheckRequest(str(tmp_path)))
    # A fraction of a second; drawing so many weights takes minutes.
    assert time.perf_counter() - start < 10
    assert [number for _, number in report.groups[0].layers] == [SHAPES[name]["num_hidden_layers"]]
    (outline,) = outlines
    assert {tensor.device.type for tensor in (*outline.parameters(), *outline.buffers())} == {"meta"}
    assert outline.num_parameters() > 8e9
