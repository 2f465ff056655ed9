"""`flashcore info`: versions, GPUs, and which kernels would run and why."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version

import torch
from rich.console import Group, RenderableType
from rich.text import Text

import flashcore_ops
from csrc_free_kernels import tuning
from flashcore_ops.commands.kernels import SHOWN_HEAD_DIM, Kernel, gpu_kernels, kernel_rows
from flashcore_ops.commands.layout import table
from flashcore_ops.commands.peak_memory import GIB


@dataclass(frozen=True)
class Gpu:
    """One GPU that torch sees."""

    name: str
    architecture: str
    memory_gib: float
    num_sms: int


@dataclass(frozen=True)
class Versions:
    """Version strings; None where there is no such thing on this machine."""

    flashcore: str
    python: str
    torch: str
    triton: str | None
    transformers: str | None
    gpu_runtime: str | None
    gpu_driver: str | None


@dataclass(frozen=True)
class Info:
    """All that `flashcore info` shows."""

    versions: Versions
    gpus: tuple[Gpu, ...]
    kernels: tuple[Kernel, ...]


def collect_info() -> Info:
    """Looks at this machine.

    Example:
        >>> collect_info().kernels[-1].tensors_on
        'cpu'
    """
    versions = collect_versions()
    gpus = collect_gpus()
    return Info(versions=versions, gpus=gpus, kernels=choose_kernels(versions, gpus))


def collect_versions() -> Versions:
    """Versions of what FlashCore stands on."""
    return Versions(
        flashcore=flashcore_ops.__version__,
        python=platform.python_version(),
        torch=torch.__version__,
        triton=package_version("triton"),
        transformers=package_version("transformers"),
        gpu_runtime=gpu_runtime(),
        gpu_driver=gpu_driver_version(),
    )


def package_version(name: str) -> str | None:
    """The installed version of a package, found without importing it, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def gpu_runtime() -> str | None:
    """The GPU runtime that torch is built for, or None."""
    if torch.version.cuda is not None:
        return f"CUDA {torch.version.cuda}"
    return f"ROCm {torch.version.hip}" if torch.version.hip is not None else None


def gpu_driver_version() -> str | None:
    """The NVIDIA driver's version, which torch cannot tell, or None where nvidia-smi does not answer."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return None
    query = [command, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(answer.stdout.split()), None)


def collect_gpus() -> tuple[Gpu, ...]:
    """The GPUs that torch sees, in torch's order."""
    if not torch.cuda.is_available():
        return ()
    return tuple(describe_gpu(torch.device("cuda", index)) for index in range(torch.cuda.device_count()))


def describe_gpu(device: torch.device) -> Gpu:
    """What torch knows of one GPU."""
    properties = torch.cuda.get_device_properties(device)
    return Gpu(
        name=properties.name,
        architecture=tuning.architecture(device),
        memory_gib=round(properties.total_memory / GIB, 1),
        num_sms=properties.multi_processor_count,
    )


def choose_kernels(versions: Versions, gpus: tuple[Gpu, ...]) -> tuple[Kernel, ...]:
    """The kernels that would serve each architecture's GPUs, then the CPU."""
    kernels: list[Kernel] = []
    for architecture, name in names_by_architecture(gpus).items():
        kernels += gpu_kernels(name, architecture, has_triton=versions.triton is not None)
    return (*kernels, cpu_kernel(versions, gpus))


def names_by_architecture(gpus: tuple[Gpu, ...]) -> dict[str, str]:
    """The GPUs of each architecture under one name.

    Example:
        >>> h100, a100 = Gpu("H100", "sm_90", 79.1, 132), Gpu("A100", "sm_80", 39.4, 108)
        >>> names_by_architecture((h100, a100, h100))
        {'sm_90': 'cuda:0,2', 'sm_80': 'cuda:1'}
    """
    indices: dict[str, list[str]] = {}
    for index, gpu in enumerate(gpus):
        indices.setdefault(gpu.architecture, []).append(str(index))
    return {architecture: f"cuda:{','.join(numbers)}" for architecture, numbers in indices.items()}


def cpu_kernel(versions: Versions, gpus: tuple[Gpu, ...]) -> Kernel:
    """The CPU's kernels, which need nothing but torch."""
    if gpus:
        reason = "for tensors on the CPU"
    elif versions.gpu_runtime is None:
        reason = "this torch has no GPU support"
    else:
        reason = "torch sees no GPU"
    return Kernel("cpu", "all", "CPU (torch SDPA)", f"{reason}; softcap, sinks, lse: dense float32")


def render_info(info: Info) -> RenderableType:
    """The facts as three short tables, for a terminal or a pipe."""
    return Group(
        Text("Versions", style="bold"),
        table(version_rows(info.versions)),
        Text("\nGPUs", style="bold"),
        table(gpu_rows(info.gpus)),
        Text("\nKernels", style="bold"),
        table(kernel_rows(info.kernels)),
        *tiles_note(info),
    )


def version_rows(versions: Versions) -> list[tuple[str, str]]:
    """Each version with its label."""
    labels = {name: name.replace("gpu_", "GPU ") for name in asdict(versions)}
    return [(labels[name], text or "none") for name, text in asdict(versions).items()]


def gpu_rows(gpus: tuple[Gpu, ...]) -> list[tuple[str, ...]]:
    """One row a GPU, or one that says there is none."""
    if not gpus:
        return [("none",)]
    return [
        (f"cuda:{index}", gpu.name, gpu.architecture, f"{gpu.memory_gib:.1f} GiB", f"{gpu.num_sms} SMs")
        for index, gpu in enumerate(gpus)
    ]


def tiles_note(info: Info) -> list[Text]:
    """Says which shape the tiles belong to, where any are shown."""
    if not info.gpus or info.versions.triton is None:
        return []
    note = f"  Tiles (query rows x KV slots) are those of bfloat16 at head dim {SHOWN_HEAD_DIM}, and one sequence."
    return [Text(note, style="dim")]


def to_json(info: Info) -> str:
    """The same facts as indented JSON, one object with `versions`, `gpus` and `kernels`."""
    return json.dumps(asdict(info), indent=2)
