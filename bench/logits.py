"""Whether a model's logits are right: the float32 answer to a case, and the largest error that passes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Cache

from bench.decoders import Decoder, layers_of
from bench.llama_cases import LlamaCase
from bench.models import Layer, Models, logits_after
from flashcore_ops.validation.float32 import in_float32

# Decode steps that a check takes.
NUM_STEPS = 4
SEED = 0


@dataclass(frozen=True)
class Target:
    """Teacher-forced logits of a case in float32, and the largest distance from them that passes.

    tokens: `[B, Q]`, the last of the case's length. exact: `[rows, T, V]`, of the last T of them, in the first and the
    last sequence. The bar is twice the error of Hugging Face's eager model in its own dtype.
    """

    tokens: Tensor
    past_length: int
    rows: list[int]
    exact: Tensor
    bar: float


def fill_randomly(cache: Cache) -> None:
    """Normal random keys and values in every slot of a static cache, the same at each call."""
    layers = layers_of(cache)
    generator = torch.Generator(layers[0][0].device).manual_seed(SEED)
    for key, value in layers:
        key.normal_(generator=generator)
        value.normal_(generator=generator)


def make_target(models: Models, cache: Cache, case: LlamaCase) -> Target:
    """The answer of a decode case on random keys and values, or of a prefill on none. Overwrites the cache."""
    fill_randomly(cache)
    num_tokens = NUM_STEPS if case.kind == "decode" else case.length
    num_logits = NUM_STEPS if case.kind == "decode" else 1
    generator = torch.Generator(models.device).manual_seed(SEED)
    vocabulary = models.plain.config.vocab_size
    shape = (case.batch, num_tokens)
    tokens = torch.randint(vocabulary, shape, generator=generator, device=models.device)
    past_length = case.length - num_tokens
    rows = sorted({0, case.batch - 1})
    exact_model = in_float32(models.plain)
    exact, error = [], 0.0
    for row in rows:
        past = _past_of_row(layers_of(cache), row, past_length)
        exact.append(logits_after(exact_model, tokens[row : row + 1], past, num_logits).float())
        plain = logits_after(models.plain, tokens[row : row + 1], past, num_logits)
        error = max(error, relative_error(plain, exact[-1]))
    return Target(tokens, past_length=past_length, rows=rows, exact=torch.cat(exact), bar=2 * error)


def logits_of(decoder: Decoder, target: Target) -> Tensor:
    """The decoder's own logits `[rows, T, V]` in float32, one call for each that the target holds."""
    decoder.set_length(target.past_length)
    # Compiled code is made for the strides too, and those of a slice are not those of the tokens that are fed back.
    calls = [
        tokens.clone(memory_format=torch.contiguous_format)
        for tokens in target.tokens.split(target.tokens.shape[1] if target.exact.shape[1] == 1 else 1, dim=1)
    ]
    # Indexing copies, so that the next call may overwrite what this one returned.
    logits = [decoder.forward(tokens)[target.rows].float() for tokens in calls]
    return torch.stack(logits, dim=1)


def relative_error(logits: Tensor, exact: Tensor) -> float:
    """The largest distance of one token's logits from the exact ones, as a share of their norm; NaN if any is NaN.

    Example:
        >>> relative_error(torch.tensor([[3.0, 4.0], [3.0, 4.5]]), torch.tensor([[3.0, 4.0], [3.0, 4.0]]))
        0.10000000149011612
    """
    distance = (logits.float() - exact).norm(dim=-1) / exact.norm(dim=-1)
    return distance.max().item()


def _past_of_row(layers: Sequence[Layer], row: int, length: int) -> list[Layer]:
    return [(key[row : row + 1, :, :length], value[row : row + 1, :, :length]) for key, value in layers]
