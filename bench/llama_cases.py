"""What bench.llama measures: shapes of whole-model runs, and their byte formulas."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedModel

from flashcore_ops.kv_memory import KVShape, weight_bytes

LENGTHS = (512, 1024, 2048, 4096, 8192, 32768)
BATCHES = (1, 8, 32)
PREFILL_LENGTHS = (512, 1024, 2048, 4096, 8192)
QUICK_LENGTHS = (512, 2048)
QUICK_BATCHES = (1,)
# Decode time should follow the length, not the capacity: this case repeats (1, 2048) in a four times larger cache.
ROOMY_LENGTH, ROOMY_CAPACITY = 2048, 8192
SLOT_MULTIPLE = 64
# Activations, logits, library workspaces and what graphs hold.
MARGIN_BYTES = 2 * 2**30


@dataclass(frozen=True)
class LlamaCase:
    """One shape of one model.

    kind: decode, tokens of `batch` sequences one by one until they are `length` long; prefill, prompts of `length`
        tokens at once; compile, the first token of a fresh process.
    capacity: slots of a static cache.

    Example:
        >>> case = LlamaCase(kind="decode", model="tiny", layers=2, batch=8, length=2048, capacity=8192)
        >>> str(case), case.to_json()["S"]
        ('decode 8 x 2048 in 8192 slots', 2048)
    """

    kind: Literal["decode", "prefill", "compile"]
    model: str
    layers: int
    batch: int
    length: int
    capacity: int

    def __str__(self) -> str:
        return f"{self.kind} {self.shape}"

    @property
    def shape(self) -> str:
        """B x S, and the capacity where it is not the usual one."""
        slots = "" if self.capacity == usual_capacity(self.length) else f" in {self.capacity} slots"
        return f"{self.batch} x {self.length}{slots}"

    def to_json(self) -> dict[str, int | str]:
        return {
            "kind": self.kind,
            "model": self.model,
            "layers": self.layers,
            "B": self.batch,
            "S": self.length,
            "capacity": self.capacity,
        }


@dataclass(frozen=True)
class ModelSizes:
    """Bytes of a model: weights that every step reads, one token's embedding, one token's keys and values in all
    layers; and its number of layers and of query heads to a KV head."""

    step_weights: int
    embedding_row: int
    kv_token: int
    num_layers: int
    group: int

    @classmethod
    def of(cls, model: PreTrainedModel) -> ModelSizes:
        """The sizes of a causal language model, whose KV cache has the dtype of its embedding."""
        config, table = model.config, model.get_input_embeddings().weight
        is_tied = model.get_output_embeddings().weight is table
        return cls(
            step_weights=weight_bytes(model) - (0 if is_tied else table.nbytes),
            embedding_row=table[0].nbytes,
            kv_token=KVShape.of(config).token_bytes(table.dtype),
            num_layers=config.num_hidden_layers,
            group=config.num_attention_heads // config.num_key_value_heads,
        )

    def cache_bytes(self, case: LlamaCase) -> int:
        """Bytes of a static cache."""
        return case.batch * case.capacity * self.kv_token

    def floor_ms(self, case: LlamaCase, read_tbs: float) -> float:
        """Milliseconds that a decode step takes to read its weights and `length` slots at the GPU's measured rate.

        Example:
            >>> sizes = ModelSizes(
            ...     step_weights=15_000_000_000, embedding_row=8192, kv_token=131072, num_layers=32, group=4
            ... )
            >>> case = LlamaCase(kind="decode", model="8b", layers=32, batch=1, length=2048, capacity=2112)
            >>> round(sizes.floor_ms(case, read_tbs=3.0), 3)
            5.089
        """
        num_bytes = self.step_weights + case.batch * (self.embedding_row + case.length * self.kv_token)
        return num_bytes / read_tbs / 1e9


def decode_cases(model: str, layers: int, batches: Sequence[int], lengths: Sequence[int]) -> list[LlamaCase]:
    """All pairs of a batch and a length, and the roomy cache where its usual twin is among them."""
    cases = [
        _case("decode", model=model, layers=layers, batch=batch, length=length)
        for batch in batches
        for length in lengths
    ]
    twin = _case("decode", model=model, layers=layers, batch=1, length=ROOMY_LENGTH)
    if twin in cases:
        roomy = LlamaCase("decode", model, layers=layers, batch=1, length=ROOMY_LENGTH, capacity=ROOMY_CAPACITY)
        cases.insert(cases.index(twin) + 1, roomy)
    return cases


def prefill_cases(model: str, layers: int, lengths: Sequence[int]) -> list[LlamaCase]:
    """One prompt of each length."""
    return [_case("prefill", model=model, layers=layers, batch=1, length=length) for length in lengths]


def compile_case(model: str, layers: int) -> LlamaCase:
    """The first token of one sequence at a length of 2048."""
    return _case("compile", model=model, layers=layers, batch=1, length=2048)


def usual_capacity(length: int) -> int:
    """The next multiple of 64 slots, and 64 more.

    Example:
        >>> usual_capacity(2048), usual_capacity(100)
        (2112, 192)
    """
    return -(-length // SLOT_MULTIPLE) * SLOT_MULTIPLE + SLOT_MULTIPLE


def why_too_large(needed_bytes: int, free_bytes: int) -> str | None:
    """Why something does not fit into memory, with a margin for what is not counted; None if it does.

    Example:
        >>> why_too_large(needed_bytes=137 * 10**9, free_bytes=62 * 10**9)
        'cannot run: needs 139.1 GB where 62.0 GB are free'
    """
    needed_bytes += MARGIN_BYTES
    if needed_bytes <= free_bytes:
        return None
    return f"cannot run: needs {needed_bytes / 1e9:.1f} GB where {free_bytes / 1e9:.1f} GB are free"


def _case(
    kind: Literal["decode", "prefill", "compile"], *, model: str, layers: int, batch: int, length: int
) -> LlamaCase:
    return LlamaCase(kind, model, layers=layers, batch=batch, length=length, capacity=usual_capacity(length))
