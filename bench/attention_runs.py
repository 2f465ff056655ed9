"""Measures one case of bench.attention: every implementation is checked, then those that are right take turns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from bench.accuracy import Target, make_target, max_abs_error
from bench.cases import Case, Inputs
from bench.harness import Ceilings, Timing, calls_per_graph, describe, num_input_sets
from bench.peers import Call, Implementation
from bench.results import Results, Row, Skip

# Calls by implementation, each of an input set's number; those numbers; calls a graph.
Timer = Callable[[Mapping[str, Callable[[int], object]], Sequence[int], int], Timing]


def judge(
    implementation: Implementation, sets: Sequence[Inputs], target: Target
) -> tuple[list[Call] | None, float, str]:
    """Calls whose first gives a right result, and its error; or None and why the implementation is not to be timed."""
    inputs = sets[0]
    try:
        reason = implementation.why_not(inputs)
        if reason is not None:
            return None, 0.0, f"cannot run: {reason}"
        calls = implementation.prepare(sets)
        # The allocator hands this block to the next tensor of its size, so an element left unwritten is NaN.
        poison = torch.full_like(inputs.query, torch.nan)
        del poison
        output = calls[0]()
        output = output.flatten(1, -3)
        if output.shape != target.exact.shape or output.dtype != inputs.query.dtype:
            return None, 0.0, f"wrong: gave {output.dtype} {list(output.shape)}"
        error = max_abs_error(output, target)
    except Exception as failure:
        return None, 0.0, f"failed: {describe(failure)}"
    if error <= target.bar:
        return calls, error, ""
    return None, error, f"wrong: error {error:.3g} where {target.bar:.3g} passes"


@torch.no_grad()
def measure_case(
    case: Case,
    implementations: Sequence[Implementation],
    ceilings: Ceilings,
    l2_bytes: int,
    generator: torch.Generator,
    timer: Timer,
) -> Results:
    """Checks every implementation of a case, then times those that are right.

    Args:
        l2_bytes: size of the cache that the rotated inputs must exceed.
        generator: draws the inputs, on its own device.
    """
    floor_us = case.floor_us(read_tbs=ceilings.read_tbs, matmul_tflops=ceilings.matmul_tflops)
    results = Results(_timing_rows(case, "floor", floor_us))
    sets = [case.random_inputs(generator) for _ in range(num_input_sets(case.num_bytes, l2_bytes))]
    target = make_target(sets[0])
    prepared: dict[str, list[Call]] = {}
    for implementation in implementations:
        calls, error, reason = judge(implementation, sets, target)
        if calls is None:
            results.skips.append(Skip(case, implementation.name, reason))
            continue
        results.rows.append(Row(case, implementation.name, "max_abs_err", error))
        prepared[implementation.name] = calls
    del target
    numbered = {name: lambda number, calls=calls: calls[number]() for name, calls in prepared.items()}
    timing = timer(numbered, range(len(sets)), calls_per_graph(floor_us, len(sets)))
    results.skips += [Skip(case, name, f"failed: {reason}") for name, reason in timing.failures.items()]
    for name, microseconds in timing.microseconds.items():
        results.rows += _timing_rows(case, name, microseconds)
    return results


def measure_cases(
    cases: Sequence[Case],
    implementations: Sequence[Implementation],
    ceilings: Ceilings,
    l2_bytes: int,
    generator: torch.Generator,
    timer: Timer,
) -> Iterator[Results]:
    """Results of one case after another; a case that fails as a whole is skipped for all implementations."""
    for case in cases:
        try:
            results = measure_case(
                case, implementations, ceilings=ceilings, l2_bytes=l2_bytes, generator=generator, timer=timer
            )
        except Exception as error:
            reason = f"failed: {describe(error)}"
            results = Results(skips=[Skip(case, item.name, reason) for item in implementations])
        finally:
            # The next case's shapes must not look like a reason for dynamic ones, and graphs keep memory to themselves.
            torch.compiler.reset()
            torch.cuda.empty_cache()
        yield results


def _timing_rows(case: Case, impl: str, microseconds: float) -> list[Row]:
    rate = ("tbs", case.tbs(microseconds)) if case.is_decode else ("tflops", case.tflops(microseconds))
    return [Row(case, impl, "us", microseconds), Row(case, impl, *rate)]
