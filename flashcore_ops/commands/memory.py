"""`flashcore memory`: bytes of a model's KV cache, MHA beside GQA, and what of it fits into a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig

from flashcore_ops.commands.byte_sizes import GpuMemory, parse_bytes, resolve_gpu_memory
from flashcore_ops.commands.loading import load_config, load_errors
from flashcore_ops.errors import OptionError
from flashcore_ops.integrations.model_checks import check_model
from flashcore_ops.kv_memory import KVShape, cache_room, weight_bytes
from flashcore_ops.model_shapes import random_model

WEIGHT_DTYPE = torch.bfloat16
BATCHES = (1, 8, 32)
LENGTHS = (512, 2048, 8192, 32768, 131072)


@dataclass(frozen=True)
class MemoryRequest:
    """The arguments of `flashcore memory`, as they were typed. No batches or lengths: the usual ones."""

    model: str
    gpu_memory: str | None = None
    batches: Sequence[int] = ()
    lengths: Sequence[int] = ()
    weights: str | None = None
    reserve: str = "2GiB"


@dataclass(frozen=True)
class MemoryReport:
    """All that `flashcore memory` shows.

    max_length: tokens that the model was made for.
    window: tokens of its sliding window, or None.
    weights_source: where the figure of the weights comes from.
    """

    model: str
    shape: KVShape
    max_length: int
    window: int | None
    batches: tuple[int, ...]
    lengths: tuple[int, ...]
    gpu: GpuMemory
    weights: int
    weights_source: str
    reserve: int

    @property
    def room(self) -> int:
        return cache_room(memory=self.gpu.num_bytes, weights=self.weights, reserve=self.reserve)


def make_report(request: MemoryRequest) -> MemoryReport:
    """Reads the model's config and does the arithmetic. No weights are fetched.

    Raises:
        OptionError: an argument that cannot be served, or a model that cannot be read.
        UnsupportedModelError: a model that FlashCore cannot serve.

    Example:
        >>> report = make_report(MemoryRequest(model="llama-3.1-8b", gpu_memory="80GB"))
        >>> report.shape.cache_bytes(batch=8, length=2048, dtype=torch.bfloat16), report.weights
        (2147483648, 16060522496)
    """
    for option, numbers in (("--batch", request.batches), ("--length", request.lengths)):
        check_counts(option, numbers)
    gpu = resolve_gpu_memory(request.gpu_memory)
    reserve = parse_bytes(request.reserve, "--reserve")
    weights = None if request.weights is None else parse_bytes(request.weights, "--weights")
    config = load_config(request.model)
    with load_errors(request.model, expected="a causal language model that transformers can build"):
        outline = random_model(config, WEIGHT_DTYPE, torch.device("meta"))
    check_model(outline)
    max_length = config.max_position_embeddings
    return MemoryReport(
        model=request.model,
        shape=KVShape.of(config),
        max_length=max_length,
        window=getattr(config, "sliding_window", None),
        batches=tuple(request.batches or BATCHES),
        lengths=tuple(request.lengths or usual_lengths(max_length)),
        gpu=gpu,
        weights=weight_bytes(outline) if weights is None else weights,
        weights_source=counted_weights(config) if weights is None else "as asked",
        reserve=reserve,
    )


def counted_weights(config: PreTrainedConfig) -> str:
    """How weights are counted that nobody gave the size of."""
    if getattr(config, "quantization_config", None) is None:
        return "bf16"
    return "in bf16, though the checkpoint is quantized: give their size by --weights"


def check_counts(option: str, numbers: Sequence[int]) -> None:
    """Raises OptionError for a number below 1."""
    for number in numbers:
        if number < 1:
            raise OptionError.explain(option, expected="1 or more", got=str(number), fix="Count from 1.")


def usual_lengths(max_length: int) -> list[int]:
    """The lengths that are shown unless others are asked for: none is longer than the model was made for.

    Example:
        >>> usual_lengths(8192), usual_lengths(100)
        ([512, 2048, 8192], [100])
    """
    return [length for length in LENGTHS if length <= max_length] or [max_length]
