"""`flashcore check`: whether a model will be served, by which kernels, and why not if not."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel

from flashcore_ops.commands.info import collect_gpus, names_by_architecture, package_version
from flashcore_ops.commands.kernels import Kernel, cpu_kernels_of, gpu_kernels_of
from flashcore_ops.commands.loading import (
    load_config,
    load_errors,
    load_generation_config,
    make_outline,
    resolve_dtype,
)
from flashcore_ops.errors import DtypeError, OptionError, UnsupportedModelError
from flashcore_ops.integrations.attention_layers import AttentionLayer, attention_layers
from flashcore_ops.integrations.decoder_layer import FlashCoreDecoderLayer
from flashcore_ops.integrations.families import Family, family_of
from flashcore_ops.integrations.generate import kept_caches_obstacle
from flashcore_ops.integrations.transformers import patch_model


@dataclass(frozen=True)
class CheckRequest:
    """The arguments of `flashcore check`, as they were typed."""

    model: str
    dtype: str = "auto"
    gpu: str | None = None


@dataclass(frozen=True)
class LayerGroup:
    """The kinds of layers that the same kernels serve, each with the number of its layers, and these kernels."""

    layers: tuple[tuple[AttentionLayer, int], ...]
    kernels: tuple[Kernel, ...]


@dataclass(frozen=True)
class CheckReport:
    """All that `flashcore check` shows.

    Attributes:
        model: as it was asked for.
        class_name: of the model.
        family: None if it is of none that is known.
        dtype: that it was checked in.
        refusal: why it is not served, or None.
        groups: all layers of a model that is served.
        obstacle: why its `generate` stays Hugging Face's on a GPU too, or None.
        is_quantized: whether the checkpoint has other layers than those that were looked at.
    """

    model: str
    class_name: str
    family: Family | None
    dtype: torch.dtype
    refusal: str | None = None
    groups: tuple[LayerGroup, ...] = ()
    obstacle: str | None = None
    is_quantized: bool = False


@dataclass(frozen=True)
class Target:
    """Where the model would run.

    Attributes:
        dtype: of its weights.
        has_cpu: whether the CPU is asked about.
        gpus: the name of the GPUs of each architecture.
    """

    dtype: torch.dtype
    has_cpu: bool
    gpus: dict[str, str]

    @classmethod
    def of(cls, request: CheckRequest) -> Target:
        """This machine's GPUs, else its CPU, and the architecture that was named.

        Raises:
            OptionError: --gpu is no architecture.
            DtypeError: --dtype is unknown.
        """
        own = names_by_architecture(collect_gpus())
        named = {} if request.gpu is None else {check_architecture(request.gpu): request.gpu}
        gpus = named | own
        dtype = resolve_dtype(request.dtype, torch.device("cuda" if gpus else "cpu"))
        return cls(dtype=dtype, has_cpu=not own, gpus=gpus)

    def kernels_of(self, layer: AttentionLayer, *, is_fused: bool) -> tuple[Kernel, ...]:
        """What serves a layer, on the CPU and on each architecture."""
        kernels = cpu_kernels_of(layer) if self.has_cpu else []
        for architecture, name in self.gpus.items():
            kernels += gpu_kernels_of(
                layer,
                name,
                architecture,
                self.dtype,
                is_fused=is_fused,
                has_triton=package_version("triton") is not None,
            )
        return tuple(kernels)


def make_report(request: CheckRequest) -> CheckReport:
    """Patches the model on the meta device, and looks at what came of it. No weights are fetched or made.

    Raises:
        OptionError: an argument that cannot be served, or a model that cannot be read.
        DtypeError: an unknown dtype.

    Example:
        >>> report = make_report(CheckRequest("llama-3.1-8b", gpu="sm_90"))
        >>> report.class_name, report.refusal
        ('LlamaForCausalLM', None)
        >>> [(layer.head_dim, number) for group in report.groups for layer, number in group.layers]
        [(128, 32)]
    """
    target = Target.of(request)
    config = load_config(request.model)
    with load_errors(request.model, expected="a model that transformers can build"):
        outline = make_outline(config, target.dtype)
    report = CheckReport(
        model=request.model,
        class_name=type(outline).__name__,
        family=family_of(type(outline)),
        dtype=target.dtype,
    )
    try:
        patch_model(outline)
    except (DtypeError, UnsupportedModelError) as refusal:
        return replace(report, refusal=str(refusal))
    with load_errors(request.model, expected="generation settings that transformers can load"):
        outline.generation_config = load_generation_config(request.model) or outline.generation_config
        obstacle = kept_caches_obstacle(outline)
    return replace(
        report,
        groups=group_layers(outline, target),
        obstacle=obstacle,
        is_quantized=getattr(config, "quantization_config", None) is not None,
    )


def group_layers(model: PreTrainedModel, target: Target) -> tuple[LayerGroup, ...]:
    """The layers of a patched model, those together that the same kernels serve."""
    is_fused = any(isinstance(module, FlashCoreDecoderLayer) for module in model.modules())
    groups: dict[tuple[Kernel, ...], list[tuple[AttentionLayer, int]]] = {}
    for layer, number in attention_layers(model).items():
        groups.setdefault(target.kernels_of(layer, is_fused=is_fused), []).append((layer, number))
    return tuple(LayerGroup(tuple(layers), kernels) for kernels, layers in groups.items())


def check_architecture(name: str) -> str:
    """The name of a GPU architecture.

    Raises:
        OptionError: for any other name.

    Example:
        >>> check_architecture("sm_90")
        'sm_90'
    """
    if not re.fullmatch(r"sm_\d{2,3}|gfx[0-9a-f]{3,4}", name):
        raise OptionError.explain(
            "--gpu",
            expected="an architecture such as sm_90 or gfx942",
            got=repr(name),
            fix="`flashcore info` names those of the GPUs here.",
        )
    return name
