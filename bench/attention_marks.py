"""The speed of attention that FlashCore sets itself on an H100."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from bench import eager, first_call
from bench.case_groups import DECODE, HEAD_DIMS, PADDED, PREFILL, RATIOS, SPECULATIVE, WINDOWED, decode, prefill
from bench.cases import Case, HostCase
from bench.figures import FLASHCORE, Figures, ratio
from bench.marks import NOTHING_MEASURABLE, Mark

PORTABLE = "flashcore_portable"


def _over_plain(figures: Figures, case: Case, metric: str) -> float | None:
    """A metric over that of the same case without its window or padding."""
    plain = replace(case, window=0, padding=0)
    return ratio(figures.get(case, FLASHCORE, metric), figures.get(plain, FLASHCORE, metric))


def _over_no_range(figures: Figures, case: Case) -> float | None:
    return ratio(figures.get(case, FLASHCORE, "us"), figures.get(case, "flashcore_no_range", "us"))


def _over_sdpa(figures: Figures, case: HostCase) -> float | None:
    return ratio(figures.get(case, FLASHCORE, "host_us"), figures.get(case, "sdpa", "host_us"))


def _value(figures: Figures, case: Any, metric: str) -> float | None:
    return figures.get(case, FLASHCORE, metric)


# Within 5% of what the memory allows already, so there is nothing left to be ahead by.
NEAR_FLOOR = (decode(batch=32, kv_len=8192), decode(batch=64, kv_len=2048), decode(batch=128, kv_len=2048))
LARGE = [case for case in (*DECODE, *HEAD_DIMS, *RATIOS) if case.query_len == 1 and case.num_kv_bytes > 256 * 10**6]
OTHER_HEADS = [case for case in (*HEAD_DIMS, *RATIOS) if case.is_decode and case.head_dim != 96 and case.group > 1]
SHORT = [case for case in PREFILL if case.query_len <= 2048]
LONG = [case for case in PREFILL if case.query_len >= 4096]
MARKS = (
    Mark(
        "decode: speed over the best peer",
        [case for case in DECODE if case not in NEAR_FLOOR],
        Figures.speedup,
        at_least=1.0,
    ),
    Mark("the same, near the floor", NEAR_FLOOR, Figures.speedup, at_least=0.99),
    Mark("the same, geometric mean", ["all twelve"], lambda figures, _: figures.mean_speedup(DECODE), at_least=1.15),
    Mark("decode: us", [decode(batch=1, kv_len=512)], partial(_value, metric="us"), at_most=4.0),
    Mark("decode: us", [decode(batch=1, kv_len=2048)], partial(_value, metric="us"), at_most=6.0),
    Mark("decode over 256 MB: part of the read rate", LARGE, Figures.read_share, at_least=0.92),
    Mark("decode, D=64 and 256, 7:1, 8:1: speed over the best peer", OTHER_HEADS, Figures.speedup, at_least=1.0),
    Mark(
        "decode, Q=2 to 8: speed over the best peer",
        [case for case in SPECULATIVE if case.query_len <= 8],
        Figures.speedup,
        at_least=1.0,
    ),
    Mark(
        "prefill, portable: speed over FlexAttention",
        PREFILL,
        partial(Figures.speedup, ours=PORTABLE, peers=["flex"]),
        at_least=1.0,
    ),
    Mark(
        "prefill, portable: speed over FlashAttention-2",
        PREFILL,
        partial(Figures.speedup, ours=PORTABLE, peers=["sdpa_flash"]),
        at_least=1.0,
    ),
    Mark("prefill, 512 to 2048: speed over cuDNN", SHORT, partial(Figures.speedup, peers=["sdpa_cudnn"]), at_least=1.0),
    Mark("prefill, 4096 on: speed over cuDNN", LONG, partial(Figures.speedup, peers=["sdpa_cudnn"]), at_least=1.0),
    Mark("the same, not to be left below", LONG, partial(Figures.speedup, peers=["sdpa_cudnn"]), at_least=0.9),
    Mark("prefill: TFLOP/s", [prefill(16384)], partial(_value, metric="tflops"), at_least=620),
    Mark(
        "prefill, windowed: TFLOP/s over those without",
        [case for case in WINDOWED if case.window and not case.is_decode],
        partial(_over_plain, metric="tflops"),
        # Tiles at both edges of a window are computed whole and seen in part.
        at_least=0.8,
    ),
    Mark(
        "prefill, left-padded: time over that without",
        [case for case in PADDED if case.padding and not case.is_decode],
        partial(_over_plain, metric="us"),
        at_most=NOTHING_MEASURABLE,
    ),
    Mark("prefill, kv_range: time over that without", PREFILL, _over_no_range, at_most=NOTHING_MEASURABLE),
    Mark("eager call: host time over SDPA's", eager.CASES, _over_sdpa, at_most=1.2),
    Mark(
        "first call, cold: ms",
        list(first_call.CASES.values()),
        partial(_value, metric="cold_ms"),
        at_most=3000,
    ),
)
