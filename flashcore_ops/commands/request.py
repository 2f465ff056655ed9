"""What `flashcore generate` was asked for, and how the model is then decoded."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from flashcore_ops.errors import OptionError
from flashcore_ops.generation import Sampling, stream_tokens

# Lengths are int32 on the device, and caches grow in powers of two.
MOST_NEW_TOKENS = 2**29
# What a model's generation config may hold that changes tokens beyond what Sampling knows.
# Settings that would change tokens and are not followed, with the values besides None that switch them off.
UNSERVED_SETTINGS: dict[str, tuple[float, ...]] = {
    **dict.fromkeys(("repetition_penalty", "guidance_scale", "typical_p", "num_beams"), (1,)),
    **dict.fromkeys(("no_repeat_ngram_size", "min_length", "min_new_tokens", "min_p"), (0,)),
    **dict.fromkeys(("epsilon_cutoff", "eta_cutoff"), (0,)),
    **dict.fromkeys(("bad_words_ids", "sequence_bias", "suppress_tokens", "begin_suppress_tokens"), ()),
    **dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id"), ()),
    **dict.fromkeys(("exponential_decay_length_penalty", "stop_strings"), ()),
}


@dataclass(frozen=True)
class GenerateRequest:
    """The arguments of `flashcore generate`, as they were typed."""

    model: str | None
    prompt: str
    max_new_tokens: int
    temperature: float
    seed: int
    dtype: str
    device: str
    compare: bool

    def check(self) -> None:
        """Raises OptionError for a value that can be refused before a model is loaded."""
        if self.model == "":
            raise OptionError.explain(
                "MODEL",
                expected="a model directory or a hub id",
                got="an empty string",
                fix="Leave it out for the default model.",
            )
        if not self.prompt:
            raise OptionError.explain(
                "--prompt", expected="some text", got="an empty string", fix="Pass the text to continue."
            )
        if not 1 <= self.max_new_tokens <= MOST_NEW_TOKENS:
            raise OptionError.explain(
                "--max-new-tokens",
                expected=f"1 to {MOST_NEW_TOKENS}",
                got=str(self.max_new_tokens),
                fix="Choose a number in that range.",
            )
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise OptionError.explain(
                "--temperature",
                expected="0 or a positive number",
                got=str(self.temperature),
                fix="Use 0 for greedy.",
            )
        if not 0 <= self.seed < 2**64:
            raise OptionError.explain(
                "--seed", expected="0 to 2**64 - 1", got=str(self.seed), fix="Choose one in that range."
            )


@dataclass(frozen=True)
class Decoding:
    """How tokens are chosen and where they stop: the request's words, and the model's settings where it has none."""

    max_new_tokens: int
    sampling: Sampling
    seed: int
    stop_tokens: list[int]

    @classmethod
    def of(cls, request: GenerateRequest, settings: GenerationConfig) -> Decoding:
        """Takes stop tokens, top_k and top_p from a model's generation config."""
        stops = settings.eos_token_id
        return cls(
            max_new_tokens=request.max_new_tokens,
            sampling=Sampling(request.temperature, top_k=settings.top_k or 0, top_p=settings.top_p or 1.0),
            seed=request.seed,
            stop_tokens=[] if stops is None else [stops] if isinstance(stops, int) else list(stops),
        )

    def __str__(self) -> str:
        """The way in words."""
        sampling = self.sampling
        if sampling.temperature == 0:
            return "greedy"
        words = [f"temperature {sampling.temperature:g}"]
        words += [f"top_k {sampling.top_k}"] if sampling.top_k else []
        words += [f"top_p {sampling.top_p:g}"] if sampling.top_p < 1 else []
        return ", ".join([*words, f"seed {self.seed}"])

    def generator(self, device: torch.device) -> torch.Generator:
        """Random numbers from the seed, anew."""
        return torch.Generator(device).manual_seed(self.seed)

    def stream(self, model: PreTrainedModel, inputs: dict[str, Tensor]) -> Iterator[Tensor]:
        """The patched model's new tokens, `[1]` a step."""
        return stream_tokens(
            model,
            inputs["input_ids"],
            inputs["attention_mask"],
            max_new_tokens=self.max_new_tokens,
            sampling=self.sampling,
            stop_tokens=self.stop_tokens,
            generator=self.generator(inputs["input_ids"].device),
        )


def ignored_settings(settings: GenerationConfig) -> list[str]:
    """Names of what a model's generation config sets that would change tokens and is not followed here.

    Example:
        >>> ignored_settings(GenerationConfig(top_k=20, repetition_penalty=1.1, min_length=0, forced_bos_token_id=1))
        ['repetition_penalty', 'forced_bos_token_id']
    """
    return [name for name, off in UNSERVED_SETTINGS.items() if getattr(settings, name, None) not in (None, *off)]
