"""Greedy tokens of both, and the rule that says whether they agree.

In float32 the tokens must be equal. In 16 bits two correct kernels part where the best logits tie within rounding. The
noise is how far Hugging Face's logits are from those of the same weights in float32; FlashCore's, fed with Hugging
Face's own tokens, may be twice as far. Where the free texts part, and wherever FlashCore prefers another token on the
way, Hugging Face's logit of that token must be within twice the noise of its best: each of the two may have moved by as
much. Hugging Face's attention is sdpa, but eager for models that ask for what sdpa leaves out.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from flashcore_ops import make_static_cache, patch_model, restore_attention
from flashcore_ops.decode_step import make_decode_step
from flashcore_ops.generation import prefill, stream_tokens
from flashcore_ops.kept_steps import capacity_for
from flashcore_ops.validation.float32 import in_float32
from flashcore_ops.validation.subject import Subject


@dataclass(frozen=True)
class Reference:
    """What Hugging Face says: tokens `[B, N]`, the float32 logits `[B, N, V]` that they come from, and the exact ones.

    exact is None for a model in float32.
    """

    tokens: Tensor
    logits: Tensor
    exact: Tensor | None

    def gaps(self, tokens: Tensor) -> Tensor:
        """`[B, N]`: how far Hugging Face's logits of tokens `[B, N]` are behind those of its own tokens."""
        best, other = (self.logits.gather(-1, chosen[..., None])[..., 0] for chosen in (self.tokens, tokens))
        return best - other


@dataclass(frozen=True)
class Comparison:
    """FlashCore's tokens beside the reference's.

    Attributes:
        reference: Hugging Face's attention that the model came with: "sdpa", or "eager" for what sdpa leaves out.
        num_tokens: compared.
        num_others: of them, those where FlashCore, given the same past, prefers another one.
        first: where the free texts part first: row, index, FlashCore's token, the reference's, and the gap between the
            reference's logits of the two.
        largest_gap: of all such gaps: where a row's free text parts, and where FlashCore, given the same past, prefers
            another token.
        error: the largest distance of FlashCore's logits from the exact ones, or from the reference's in float32.
        noise: the same of the reference's; None in float32, where none is granted.
        chooses_its_best: whether each step of FlashCore's put the likeliest of its own logits.
        tokens: FlashCore's, generated freely, `[B, N]`.
        ms_per_token: of FlashCore's free generation, without the first token.
    """

    reference: str
    num_tokens: int
    num_others: int
    first: tuple[int, int, int, int, float] | None
    largest_gap: float
    error: float
    noise: float | None
    chooses_its_best: bool
    tokens: list[list[int]]
    ms_per_token: float | None

    @property
    def agrees(self) -> bool:
        if not (self.chooses_its_best and math.isfinite(self.error)):
            return False
        if self.noise is None:
            return self.first is None
        return math.isfinite(self.noise) and max(self.largest_gap, self.error) <= 2 * self.noise

    def evidence(self) -> str:
        """One line."""
        parts = [f"{self.num_tokens} tokens compared"]
        if self.first is None:
            parts.append("all equal")
        else:
            row, index, token, reference_token, gap = self.first
            where = f"row {row}, " if len(self.tokens) > 1 else ""
            what = f"{token}, {self.reference} {reference_token}, gap {gap:.3g}"
            parts.append(f"first difference at {where}index {index}: {what}")
        if self.noise is not None:
            worse = f"at most {self.largest_gap:.3g} worse"
            parts.append(f"{self.num_others} preferred otherwise, by {self.reference}'s logits {worse}")
            parts.append(f"logits off by {self.error:.3g}, {self.reference}'s by {self.noise:.3g}")
        if not self.chooses_its_best:
            parts.append("a step did not put the likeliest of its logits")
        if self.ms_per_token is not None:
            parts.append(f"{self.ms_per_token:.2f} ms a token")
        return "; ".join(parts)


@contextmanager
def patched(subject: Subject) -> Iterator[Any]:
    """The subject's model on FlashCore, and as it came afterwards. A GPU's peak memory counts from here."""
    model = patch_model(subject.model)
    if subject.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(subject.device)
    try:
        yield model
    finally:
        restore_attention(model)


def refer(subject: Subject, inputs: dict[str, Tensor], num_tokens: int) -> Reference:
    """num_tokens greedy tokens of Hugging Face after the prompts, whatever they are."""
    model: Any = subject.model
    own_config = model.generation_config
    # generate takes from here what it is not told, such as tokens that end a text.
    model.generation_config = GenerationConfig(pad_token_id=0)
    try:
        output = model.generate(
            **inputs, do_sample=False, max_new_tokens=num_tokens, return_dict_in_generate=True, output_logits=True
        )
    finally:
        model.generation_config = own_config
    prompt_len = inputs["input_ids"].shape[1]
    exact = None
    if subject.dtype != torch.float32:
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, num_tokens - 1), value=1)
        whole = in_float32(model)(
            input_ids=output.sequences[:, :-1],
            attention_mask=mask,
            position_ids=(mask.cumsum(dim=-1) - 1).clamp(min=0),
            use_cache=False,
            logits_to_keep=num_tokens,
        )
        exact = whole.logits
    return Reference(output.sequences[:, prompt_len:], torch.stack(output.logits, dim=1).float(), exact)


def compare(subject: Subject, inputs: dict[str, Tensor], num_tokens: int) -> Comparison:
    """Both ways of greedy decoding, num_tokens tokens after the prompts."""
    reference_name = subject.model.config._attn_implementation
    reference = refer(subject, inputs, num_tokens)
    with patched(subject) as model:
        tokens, ms_per_token = _write(model, inputs, num_tokens)
        logits, chooses_its_best = _teach(model, inputs, reference.tokens)
    preferred = logits.argmax(dim=-1)
    taught_gaps = reference.gaps(preferred)
    free_gaps = reference.gaps(tokens.to(preferred.device))
    partings = _partings(tokens, reference.tokens.cpu())
    exact = reference.logits if reference.exact is None else reference.exact
    first = min(partings, key=lambda place: (place[1], place[0]), default=None)
    return Comparison(
        reference=reference_name,
        num_tokens=reference.tokens.numel(),
        num_others=int((preferred != reference.tokens).sum()),
        first=None
        if first is None
        else (*first, int(tokens[first]), int(reference.tokens[first]), free_gaps[first].item()),
        largest_gap=max([taught_gaps.max().item(), *[free_gaps[place].item() for place in partings]]),
        error=_distance(logits, exact),
        noise=None if reference.exact is None else _distance(reference.logits, exact),
        chooses_its_best=chooses_its_best,
        tokens=tokens.tolist(),
        ms_per_token=ms_per_token,
    )


def _partings(tokens: Tensor, reference_tokens: Tensor) -> list[tuple[int, int]]:
    """Row and index of the first token of each row that differs, where one does. Behind it the pasts differ too."""
    differing = tokens != reference_tokens
    return [(row, int(places[0])) for row, line in enumerate(differing) if len(places := line.nonzero())]


def _distance(logits: Tensor, exact: Tensor) -> float:
    """The largest difference; infinite if one is NaN."""
    difference = (logits - exact).abs().max()
    return torch.inf if difference.isnan() else difference.item()


def _write(model: Any, inputs: dict[str, Tensor], num_tokens: int) -> tuple[Tensor, float | None]:
    """Tokens `[B, N]` of a free generation, and milliseconds for each after the first."""
    prompts = inputs["input_ids"], inputs["attention_mask"]
    # Kernels compile, and the step is recorded, in a generation of its own.
    for _ in stream_tokens(model, *prompts, max_new_tokens=min(2, num_tokens)):
        pass
    steps, times = [], []
    for step in stream_tokens(model, *prompts, max_new_tokens=num_tokens):
        steps.append(step)
        times.append(time.perf_counter())
    ms_per_token = (times[-1] - times[0]) * 1e3 / (num_tokens - 1) if num_tokens > 1 else None
    return torch.stack(steps, dim=1), ms_per_token


def _teach(model: Any, inputs: dict[str, Tensor], tokens: Tensor) -> tuple[Tensor, bool]:
    """FlashCore's float32 logits `[B, N, V]` for each of tokens `[B, N]`, given those before it.

    And whether each step put the likeliest token of its own logits, as a free generation would go on with.
    """
    batch_size, prompt_len = inputs["input_ids"].shape
    cache = make_static_cache(model, batch_size, capacity_for(prompt_len + tokens.shape[1]))
    step = make_decode_step(model, cache)
    logits = [prefill(model, step, inputs["input_ids"], inputs["attention_mask"]).float()]
    chooses_its_best = True
    for index in range(tokens.shape[1] - 1):
        step.tokens.copy_(tokens[:, index : index + 1])
        step.run()
        # The next step writes to the same place.
        logits.append(step.logits.to(torch.float32, copy=True))
        chooses_its_best = chooses_its_best and torch.equal(step.tokens[:, 0], logits[-1].argmax(dim=-1))
    return torch.stack(logits, dim=1), chooses_its_best
