"""Timing on a GPU, and the rates that the GPU itself reaches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from statistics import median
from typing import TypeVar

import torch

T = TypeVar("T")

# Long enough for a graph's launch to vanish in it; more calls than this only cost capture time.
GRAPH_US = 1500.0
MAX_CALLS = 200
# Caches do not evict in strict order, so a set comes round again only after several times their size.
L2_MULTIPLE = 4


@dataclass(frozen=True)
class Timing:
    """Median microseconds of one call by implementation, and why the others have none."""

    microseconds: dict[str, float]
    failures: dict[str, str]


@dataclass(frozen=True)
class Ceilings:
    """Measured rates of this GPU: TB/s copied (bytes read plus bytes written), TB/s read by a sum, TFLOP/s of a bf16
    8192^3 matrix product, microseconds of the smallest kernel in a CUDA graph."""

    copy_tbs: float
    read_tbs: float
    matmul_tflops: float
    graph_kernel_us: float


def num_input_sets(num_bytes: int, l2_bytes: int) -> int:
    """How many input sets to rotate among, so that none is still in the L2 when it comes round again.

    Example:
        >>> num_input_sets(num_bytes=2**21, l2_bytes=50 * 2**20), num_input_sets(num_bytes=2**30, l2_bytes=50 * 2**20)
        (101, 2)
    """
    return max(2, math.ceil(L2_MULTIPLE * l2_bytes / num_bytes) + 1)


def calls_per_graph(call_us: float, num_inputs: int) -> int:
    """How many calls one graph holds: whole rounds over the inputs, about GRAPH_US of work, two calls at least.

    Example:
        >>> calls_per_graph(call_us=177.0, num_inputs=2), calls_per_graph(call_us=0.7, num_inputs=101)
        (10, 202)
    """
    wanted = min(MAX_CALLS, max(2, math.ceil(GRAPH_US / call_us)))
    return num_inputs * math.ceil(wanted / num_inputs)


def time_interleaved(
    calls: Mapping[str, Callable[[T], object]], inputs: Sequence[T], num_calls: int, repeats: int
) -> Timing:
    """Times calls on the current GPU, each in a CUDA graph of its own, taking turns.

    Args:
        calls: one function of an input set for each implementation.
        inputs: the sets that a graph goes through in turn.
        num_calls: calls in one graph.
        repeats: timed replays of each graph.

    A call that fails when run or captured is reported and left out. The GPU never waits for the host between replays,
    so a graph's launch is hidden behind the replay before it.
    """
    graphs: dict[str, torch.cuda.CUDAGraph] = {}
    failures: dict[str, str] = {}
    for name, call in calls.items():
        try:
            graphs[name] = _capture(call, inputs, num_calls)
        except Exception as error:
            failures[name] = describe(error)
    for graph in graphs.values():
        graph.replay()
    spans: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in graphs}
    for name in take_turns(list(graphs), repeats):
        spans[name].append(_timed_replay(graphs[name]))
    torch.cuda.synchronize()
    microseconds = {
        name: median(start.elapsed_time(end) for start, end in pairs) * 1e3 / num_calls for name, pairs in spans.items()
    }
    return Timing(microseconds=microseconds, failures=failures)


def take_turns(names: Sequence[str], repeats: int) -> Iterator[str]:
    """Every name once a round, and before each of the others as often as before any: what ran before leaves its mark,
    a GPU that it has warmed most of all.

    Source: E. J. Williams, Experimental designs balanced for the estimation of residual effects of treatments, 1949.

    Example:
        >>> list(take_turns(["a", "b", "c", "d"], repeats=2))
        ['a', 'b', 'd', 'c', 'b', 'c', 'a', 'd']
    """
    size = len(names)
    # 0, 1, -1, 2, -2 and so on: no two neighbours are equally far apart.
    zigzag = [(i + 1) // 2 * (1 if i % 2 else -1) for i in range(size)]
    for repeat in range(repeats):
        places = [(place + repeat) % size for place in zigzag]
        # Of an odd number the second half of the design is the first one backwards.
        is_backward = size % 2 == 1 and repeat // size % 2 == 1
        yield from (names[place] for place in (reversed(places) if is_backward else places))


def measure_ceilings(repeats: int) -> Ceilings:
    """Measures the current GPU. Takes 4 GiB of its memory."""
    source = torch.randn(2**29, device="cuda")
    target = torch.empty_like(source)
    factors = torch.randn(2, 8192, 8192, dtype=torch.bfloat16, device="cuda")
    small = torch.randn(32, device="cuda")

    def microseconds(call: Callable[[None], object], num_calls: int) -> float:
        timing = time_interleaved({"ceiling": call}, [None], num_calls=num_calls, repeats=repeats)
        if timing.failures:
            raise RuntimeError(f"a ceiling cannot be measured: {timing.failures['ceiling']}")
        return timing.microseconds["ceiling"]

    num_bytes = source.nbytes
    return Ceilings(
        copy_tbs=2 * num_bytes / microseconds(lambda _: target.copy_(source), num_calls=2) / 1e6,
        read_tbs=num_bytes / microseconds(lambda _: source.sum(), num_calls=4) / 1e6,
        matmul_tflops=2 * 8192**3 / microseconds(lambda _: factors[0] @ factors[1], num_calls=2) / 1e6,
        graph_kernel_us=microseconds(lambda _: small.add_(1), num_calls=1000),
    )


def describe(error: Exception) -> str:
    """The class and the first line of an error, and of the one during whose handling it came.

    Example:
        >>> describe(RuntimeError("No available kernel. Aborting execution.\\nmore"))
        'RuntimeError: No available kernel. Aborting execution.'
    """
    first_line = next(islice(str(error).splitlines(), 1), "")
    described = f"{type(error).__name__}: {first_line}".rstrip(": ")
    # A failed capture fails once more as it ends, and only the first failure says why.
    cause = error.__context__
    return f"{described} (after {describe(cause)})" if isinstance(cause, Exception) else described


def _capture(call: Callable[[T], object], inputs: Sequence[T], num_calls: int) -> torch.cuda.CUDAGraph:
    previous = torch.cuda.current_stream()
    # Kernels are compiled and handles made outside of the capture, on a side stream as capture requires.
    side = torch.cuda.Stream()
    side.wait_stream(previous)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.stream(side):
            for item in inputs:
                call(item)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            for index in range(num_calls):
                call(inputs[index % len(inputs)])
    finally:
        # A capture that fails leaves its own stream current.
        torch.cuda.set_stream(previous)
    return graph


def _timed_replay(graph: torch.cuda.CUDAGraph) -> tuple[torch.cuda.Event, torch.cuda.Event]:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    graph.replay()
    end.record()
    return start, end
