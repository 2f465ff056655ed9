"""`flashcore info`: rendering of fixed facts, the choice of kernels, and the command on this machine."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import torch
from click.testing import Result
from rich.console import Console
from typer.testing import CliRunner

from csrc_free_kernels import decode_tuning, tuning
from flashcore_ops.cli import app
from flashcore_ops.commands.info import Gpu, Info, Versions, choose_kernels, render_info, to_json
from flashcore_ops.commands.kernels import Kernel
from tests.snapshots import assert_expected_inline

VERSIONS = Versions(
    flashcore="0.1.0",
    python="3.12.3",
    torch="2.11.0+cu130",
    triton="3.6.0",
    transformers="5.17.0",
    gpu_runtime="CUDA 13.0",
    gpu_driver="580.95.05",
)
NO_TRITON = replace(VERSIONS, torch="2.11.0", triton=None, gpu_driver=None)
CPU_ONLY = Versions(
    flashcore="0.1.0",
    python="3.11.7",
    torch="2.13.0+cpu",
    triton="3.6.0",
    transformers="5.17.0",
    gpu_runtime=None,
    gpu_driver=None,
)
H100 = Gpu(name="NVIDIA H100 80GB HBM3", architecture="sm_90", memory_gib=79.1, num_sms=132)
A100 = Gpu(name="NVIDIA A100-SXM4-40GB", architecture="sm_80", memory_gib=39.4, num_sms=108)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["info", *arguments], env={"FORCE_COLOR": None})


def rendered(info: Info, width: int = 100) -> str:
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(render_info(info))
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def facts(versions: Versions, *gpus: Gpu) -> Info:
    return Info(versions=versions, gpus=gpus, kernels=choose_kernels(versions, gpus))


def test_no_gpu() -> None:
    assert_expected_inline(
        rendered(facts(CPU_ONLY)),
        """\
Versions
  flashcore     0.1.0
  python        3.11.7
  torch         2.13.0+cpu
  triton        3.6.0
  transformers  5.17.0
  GPU runtime   none
  GPU driver    none

GPUs
  none

Kernels
  cpu  all  CPU (torch SDPA)  this torch has no GPU support; softcap, sinks, lse: dense float32""",
    )


def test_h100() -> None:
    assert_expected_inline(
        rendered(facts(VERSIONS, H100)),
        """\
Versions
  flashcore     0.1.0
  python        3.12.3
  torch         2.11.0+cu130
  triton        3.6.0
  transformers  5.17.0
  GPU runtime   CUDA 13.0
  GPU driver    580.95.05

GPUs
  cuda:0  NVIDIA H100 80GB HBM3  sm_90  79.1 GiB  132 SMs

Kernels
  cuda:0  prefill  Triton tiled      over 16 query tokens; sm_90: 128x64 tiles, 8 warps, 3 stages
  cuda:0  prefill  Gluon for Hopper  the same in 16 bits, without softcap; sm_90: specialised warps
  cuda:0  decode   Triton split-KV   up to 16 query tokens; sm_90: 16x64 tiles, 4 warps, 5 stages
  cuda:0  decode   Gluon for Hopper  16 bits, no softcap; sm_90: 16x128 tiles, 4 warps, ring of 3
  cuda:0  append   Triton append     new tokens into a static cache
  cpu     all      CPU (torch SDPA)  for tensors on the CPU; softcap, sinks, lse: dense float32
  Tiles (query rows x KV slots) are those of bfloat16 at head dim 128, and one sequence.""",
    )


def test_gpu_without_triton() -> None:
    assert_expected_inline(
        rendered(facts(NO_TRITON, H100)),
        """\
Versions
  flashcore     0.1.0
  python        3.12.3
  torch         2.11.0
  triton        none
  transformers  5.17.0
  GPU runtime   CUDA 13.0
  GPU driver    none

GPUs
  cuda:0  NVIDIA H100 80GB HBM3  sm_90  79.1 GiB  132 SMs

Kernels
  cuda:0  all  none: every call raises  triton is not installed
  cpu     all  CPU (torch SDPA)         for tensors on the CPU; softcap, sinks, lse: dense float32""",
    )


def test_a_narrow_terminal_wraps_inside_the_column() -> None:
    lines = rendered(facts(NO_TRITON, H100), width=60).splitlines()
    assert max(len(line) for line in lines) <= 60


def test_a_torch_with_gpu_support_that_sees_none() -> None:
    (kernel,) = choose_kernels(VERSIONS, ())
    assert kernel == Kernel("cpu", "all", "CPU (torch SDPA)", "torch sees no GPU; softcap, sinks, lse: dense float32")


def test_kernels_are_listed_once_an_architecture_with_its_tiles() -> None:
    kernels = choose_kernels(VERSIONS, (H100, A100, H100))
    assert [(row.tensors_on, row.operation) for row in kernels] == [
        ("cuda:0,2", "prefill"),
        ("cuda:0,2", "prefill"),
        ("cuda:0,2", "decode"),
        ("cuda:0,2", "decode"),
        ("cuda:0,2", "append"),
        ("cuda:1", "prefill"),
        ("cuda:1", "decode"),
        ("cuda:1", "append"),
        ("cpu", "all"),
    ]
    tiles = tuning.prefill_tiles("sm_90", torch.bfloat16, 128)
    assert kernels[0].reason == (
        f"over {decode_tuning.MAX_DECODE_TOKENS} query tokens; sm_90: {tiles.block_m}x{tiles.block_n} tiles, "
        f"{tiles.num_warps} warps, {tiles.num_stages} stages"
    )


def test_json_holds_the_same_facts() -> None:
    found = json.loads(to_json(facts(NO_TRITON, H100)))
    assert found["versions"]["torch"] == "2.11.0"
    assert found["versions"]["triton"] is None
    assert found["gpus"] == [
        {"name": "NVIDIA H100 80GB HBM3", "architecture": "sm_90", "memory_gib": 79.1, "num_sms": 132}
    ]
    assert found["kernels"][0]["reason"] == "triton is not installed"


def test_the_command_on_this_machine() -> None:
    result = run()
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    normalised = re.sub(r"(?m)^(  [\w ]+?)  +.*$", r"\1  VERSION", result.stdout.split("\n\n")[0])
    assert_expected_inline(
        normalised,
        """\
Versions
  flashcore  VERSION
  python  VERSION
  torch  VERSION
  triton  VERSION
  transformers  VERSION
  GPU runtime  VERSION
  GPU driver  VERSION""",
    )
    as_json = run("--json")
    assert as_json.exit_code == 0, as_json.output
    assert list(json.loads(as_json.stdout)) == ["versions", "gpus", "kernels"]
