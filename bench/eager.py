"""What one eager call of the op costs the host, beside torch's scaled_dot_product_attention on the same tensors."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from statistics import median

import torch
from torch.nn.functional import scaled_dot_product_attention

import flashcore_ops  # noqa: F401 registers the ops
from bench.accuracy import make_target, max_abs_error
from bench.cases import Case, HostCase, Inputs
from bench.harness import describe, take_turns
from bench.results import Results, Row, Skip
from flashcore_ops.uncollected import uncollected

# Few enough for the GPU's queue to take all their launches at once, so that the host never waits.
NUM_CALLS = 100
CASES = (
    HostCase("eager", Case(batch=1, query_len=1, kv_len=2048)),
    HostCase("eager", Case(batch=1, query_len=512, kv_len=512)),
)
IMPLS = ("flashcore", "sdpa")


def calls_on(inputs: Inputs) -> dict[str, Callable[[], torch.Tensor]]:
    """Both implementations on one set of tensors, as their users call them."""
    query, key, value, case = inputs.query, inputs.key, inputs.value, inputs.case
    # A single token sees every slot, where SDPA's causal mask would show it the first one only.
    is_causal = case.query_len > 1
    sdpa = partial(scaled_dot_product_attention, query, key, value, is_causal=is_causal, enable_gqa=case.group > 1)
    op = partial(torch.ops.flashcore.attention, query, key, value, inputs.kv_range)
    return dict(zip(IMPLS, (op, sdpa), strict=True))


@torch.no_grad()
def measure_eager(
    case: HostCase, generator: torch.Generator, repeats: int, synchronize: Callable[[], None] = torch.cuda.synchronize
) -> Results:
    """Host microseconds of a call, by implementation, as metric host_us. Both are checked first.

    Args:
        generator: draws the inputs, on its own device.
        repeats: bursts of each implementation, of which the median counts.
        synchronize: waits for the device.
    """
    results = Results()
    inputs = case.case.random_inputs(generator)
    target = make_target(inputs)
    calls = calls_on(inputs)
    for name in IMPLS:
        try:
            error = max_abs_error(calls[name](), target)
            reason = "" if error <= target.bar else f"wrong: error {error:.3g} where {target.bar:.3g} passes"
        except Exception as failure:
            reason = f"failed: {describe(failure)}"
        if reason:
            results.skips.append(Skip(case, name, reason))
            del calls[name]
    times = time_host(calls, repeats, synchronize)
    results.rows += [Row(case, name, "host_us", microseconds) for name, microseconds in times.items()]
    return results


def time_host(
    calls: Mapping[str, Callable[[], object]], repeats: int, synchronize: Callable[[], None]
) -> dict[str, float]:
    """Median host microseconds of one call, in bursts that take turns and do not wait for the device."""
    bursts: dict[str, list[float]] = {name: [] for name in calls}
    with uncollected():
        for name in take_turns(list(calls), repeats):
            call = calls[name]
            synchronize()
            start = time.perf_counter()
            for _ in range(NUM_CALLS):
                call()
            bursts[name].append((time.perf_counter() - start) * 1e6 / NUM_CALLS)
    return {name: median(times) for name, times in bursts.items()}
