"""The speed of a whole model that FlashCore sets itself on an H100."""

from __future__ import annotations

from functools import partial

from bench.figures import FLOOR, Figures, ratio
from bench.llama_cases import BATCHES, LENGTHS, ROOMY_LENGTH, LlamaCase, compile_case, decode_cases
from bench.marks import NOTHING_MEASURABLE, Mark
from bench.models import LLAMA_3_1_8B

LOOP = "flashcore_loop"
NUM_LAYERS = 32
# Keys and values of 32 sequences of 32768 tokens do not fit 80 GB.
DECODE = [
    case
    for case in decode_cases(LLAMA_3_1_8B, NUM_LAYERS, batches=BATCHES, lengths=LENGTHS)
    if (case.batch, case.length) != (32, 32768)
]
TIGHT, ROOMY = [case for case in DECODE if (case.batch, case.length) == (1, ROOMY_LENGTH)]
FIRST_TOKEN = compile_case(LLAMA_3_1_8B, NUM_LAYERS)


def _over_floor(figures: Figures, case: LlamaCase) -> float | None:
    return ratio(figures.get(case, LOOP, "loop_ms"), figures.get(case, FLOOR, "loop_ms"))


def _over_tight(figures: Figures, case: LlamaCase) -> float | None:
    return ratio(figures.get(case, LOOP, "loop_ms"), figures.get(TIGHT, LOOP, "loop_ms"))


def _over_hugging_face(figures: Figures, case: LlamaCase) -> float | None:
    return ratio(figures.get(case, "flashcore_eager", "loop_ms"), figures.get(case, "hf_eager", "loop_ms"))


def _synchronisation(figures: Figures, case: LlamaCase) -> float | None:
    step, loop = figures.get(case, LOOP, "step_ms"), figures.get(case, LOOP, "loop_ms")
    return None if step is None or loop is None else step - loop


def _first_token(figures: Figures, case: LlamaCase, metric: str) -> float | None:
    return figures.get(case, LOOP, metric)


MARKS = (
    Mark(
        "decode, batch 1: time over the floor",
        [case for case in DECODE if case.batch == 1],
        _over_floor,
        at_most=1.10,
    ),
    Mark("the same at 2048", [TIGHT, ROOMY], _over_floor, at_most=1.07),
    Mark("the same, batches 8 and 32", [case for case in DECODE if case.batch > 1], _over_floor, at_most=1.15),
    Mark("decode, roomy cache: time over a tight one's", [ROOMY], _over_tight, at_most=NOTHING_MEASURABLE),
    Mark("decode: ms that waiting for each step adds", DECODE, _synchronisation, at_most=0.4),
    Mark("decode, eager: time over Hugging Face's", DECODE, _over_hugging_face, at_most=1.02),
    Mark("first token, cold: ms", [FIRST_TOKEN], partial(_first_token, metric="cold_ms"), at_most=40_000),
    Mark("first token, warm: ms", [FIRST_TOKEN], partial(_first_token, metric="warm_ms"), at_most=10_000),
)
