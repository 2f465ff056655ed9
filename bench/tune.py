"""`python -m bench.tune`: searches the tiles of decode's kernels on the current GPU: what decode_tuning.py and
linear_tuning.py should hold.

A kernel is timed in the chain of launches that it runs in: dependent launches overlap, so what is fastest alone need
not be so between its neighbours. The kinds of launches are searched one after another, each with the best of the
others. Exit status: 0 all went well, 1 the GPU's memory is too small, 2 there is no GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, TypeVar
from unittest import mock

import torch
import typer
from rich.console import Console
from torch import Tensor

import flashcore_ops
from bench.harness import describe, time_interleaved
from csrc_free_kernels import decode_tuning, linear_tuning, tuning
from csrc_free_kernels.decode_tuning import DecodePlan, RingTiles
from csrc_free_kernels.linear_tuning import LinearTiles
from csrc_free_kernels.tuning import Tiles

T = TypeVar("T")

# LLaMA-3.1-8B.
HIDDEN, INTERMEDIATE, NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 4096, 14336, 32, 8, 128
WIDTHS = (NUM_HEADS * HEAD_DIM, NUM_KV_HEADS * HEAD_DIM, NUM_KV_HEADS * HEAD_DIM)
# (rows of weights, depth) of each linear launch.
LINEAR_KINDS = {
    "qkv": (sum(WIDTHS), HIDDEN),
    "output": (HIDDEN, WIDTHS[0]),
    "gate_up": (2 * INTERMEDIATE, HIDDEN),
    "down": (HIDDEN, INTERMEDIATE),
}
# Enough layers for the weights of one to have left the L2 before they come round again.
NUM_LAYERS = 8


Choice = dict[str, LinearTiles | DecodePlan]


@dataclass(frozen=True)
class Layer:
    """Random weights and caches of one decoder layer."""

    norm: Tensor
    qkv: list[Tensor]
    output: Tensor
    gate_up: list[Tensor]
    down: Tensor
    key_cache: Tensor
    value_cache: Tensor


def make_layer(batch: int, capacity: int) -> Layer:
    """A layer on the current GPU."""

    def weight(rows: int, depth: int) -> Tensor:
        return torch.empty(rows, depth, dtype=torch.bfloat16, device="cuda").normal_(0, 0.02)

    caches = torch.randn(2, batch, NUM_KV_HEADS, capacity, HEAD_DIM, dtype=torch.bfloat16, device="cuda")
    return Layer(
        norm=torch.ones(HIDDEN, dtype=torch.bfloat16, device="cuda"),
        qkv=[weight(width, HIDDEN) for width in WIDTHS],
        output=weight(HIDDEN, WIDTHS[0]),
        gate_up=[weight(INTERMEDIATE, HIDDEN) for _ in range(2)],
        down=weight(HIDDEN, INTERMEDIATE),
        key_cache=caches[0].clone(),
        value_cache=caches[1].clone(),
    )


def run_chain(layers: Sequence[Layer], hidden: Tensor, rotation: Tensor, kv_range: Tensor) -> Tensor:
    """The launches of a decode step through some layers."""
    linear = partial(flashcore_ops.linear, has_constant_weights=True)
    for layer in layers:
        joint = linear(hidden, layer.qkv, layer.norm)
        query, key, value = (part.unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2) for part in joint.split(WIDTHS, dim=-1))
        attended = flashcore_ops.rope_append_attention(
            *(query, key, value, rotation, rotation, layer.key_cache, layer.value_cache, kv_range),
            next_weight=layer.output,
        ).transpose(1, 2)
        hidden = linear(attended.flatten(2), [layer.output], residual=hidden)
        gated = linear(hidden, layer.gate_up, layer.norm, is_gated=True)
        hidden = linear(gated, [layer.down], residual=hidden)
    return hidden


def shipped_choice(batch: int, capacity: int) -> Choice:
    """What decode_tuning.py and linear_tuning.py hold for the current GPU."""
    device = torch.device("cuda", torch.cuda.current_device())
    arch, num_multiprocessors = tuning.architecture(device), tuning.num_multiprocessors(device)
    choice: Choice = {
        kind: linear_tuning.linear_tiles(
            arch,
            torch.bfloat16,
            num_rows=batch,
            num_columns=num_columns,
            depth=depth,
            num_multiprocessors=num_multiprocessors,
            is_aligned=True,
        )
        for kind, (num_columns, depth) in LINEAR_KINDS.items()
    }
    choice["attention"] = decode_tuning.plan_decode(
        *(arch, torch.bfloat16, HEAD_DIM),
        num_rows=NUM_HEADS // NUM_KV_HEADS,
        num_heads=batch * NUM_KV_HEADS,
        kv_len=capacity,
        num_multiprocessors=num_multiprocessors,
        has_ring=tuning.is_hopper(arch),
    )
    return choice


def candidates(shipped: Choice, batch: int) -> dict[str, list[LinearTiles | DecodePlan]]:
    """What to try for each kind of launch, what is shipped first."""
    tried: dict[str, list[LinearTiles | DecodePlan]] = {kind: [choice] for kind, choice in shipped.items()}
    for kind in LINEAR_KINDS:
        tiles = shipped[kind]
        if isinstance(tiles, LinearTiles):
            tried[kind] += _linear_candidates(tiles, batch)
    attention = shipped["attention"]
    if isinstance(attention, DecodePlan):
        tried["attention"] += _attention_candidates(attention, batch)
    return {kind: list(dict.fromkeys(choices)) for kind, choices in tried.items()}


def _attention_candidates(shipped: DecodePlan, batch: int) -> list[DecodePlan]:
    all_splits = sorted({1, 2, 4, max(1, 132 // (8 * batch)), max(1, 264 // (8 * batch))})
    if isinstance(shipped.tiles, RingTiles):
        rings = [(64, 4, 2), (64, 4, 3), (64, 4, 4), (64, 4, 6), (128, 4, 2), (128, 4, 3)]
        return [
            DecodePlan(RingTiles(shipped.tiles.held_rows, *ring), num_splits, prefetched_slots)
            for ring in rings
            for num_splits in all_splits
            for prefetched_slots in (64, 128)
        ]
    shapes = [(32, 4, 4), (64, 4, 3), (64, 4, 5), (128, 4, 2), (128, 4, 3), (128, 8, 3)]
    return [DecodePlan(Tiles(16, *shape), num_splits) for shape in shapes for num_splits in all_splits]


def _linear_candidates(shipped: LinearTiles, batch: int) -> list[LinearTiles]:
    if shipped.has_ring:
        return [
            replace(shipped, block_n=block_n, num_stages=num_slots)
            for block_n in (16, 32, 64, 128)
            for num_slots in (2, 3, 4, 5, 6)
        ]
    if batch == 1:
        shapes = [(4, 2048, 4, 1), (8, 2048, 8, 1), (2, 2048, 2, 1), (8, 1024, 4, 1), (16, 1024, 8, 1), (4, 4096, 8, 1)]
    else:
        shapes = [
            (block_n, block_k, num_warps, num_stages)
            for block_n, block_k in ((16, 256), (16, 512), (32, 128), (32, 256), (32, 512), (64, 128), (128, 128))
            for num_warps, num_stages in ((4, 3), (4, 4), (4, 6), (8, 4))
        ]
    tiles = [LinearTiles(shipped.block_m, *shape, shipped.prefetched_bytes) for shape in shapes]
    budgets = [replace(shipped, prefetched_bytes=megabytes * 2**20) for megabytes in (1, 2, 4, 8, 16)]
    return tiles + budgets


@contextmanager
def tuned(choice: Mapping[str, LinearTiles | DecodePlan]) -> Iterator[None]:
    """Has the launches inside take these tiles."""
    kinds = {shape: kind for kind, shape in LINEAR_KINDS.items()}
    attention = choice["attention"]
    if not isinstance(attention, DecodePlan):
        raise TypeError("the attention's choice is no DecodePlan")

    def linear_tiles(*_: object, num_columns: int, depth: int, **__: object) -> LinearTiles | DecodePlan:
        return choice[kinds[num_columns, depth]]

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(linear_tuning, "linear_tiles", linear_tiles))
        stack.enter_context(mock.patch.object(decode_tuning, "plan_decode", return_value=attention))
        yield


def descend(
    tried: Mapping[str, Sequence[T]], measure: Callable[[dict[str, T]], float]
) -> Iterator[tuple[str, list[tuple[float, T]]]]:
    """Coordinate descent: for one kind after another, all its candidates by time, the others at the best so far.

    Args:
        tried: candidates by kind; the search starts from the first of each.
        measure: the time of a choice, infinite if it cannot run.

    Yields:
        The kind, and its candidates with their times, the fastest first.

    Example:
        >>> for kind, ranked in descend({"a": [3, 1], "b": [5, 2]}, lambda choice: choice["a"] * choice["b"]):
        ...     print(kind, ranked)
        a [(5, 1), (15, 3)]
        b [(2, 2), (5, 5)]
    """
    best = {kind: choices[0] for kind, choices in tried.items()}
    for kind, choices in tried.items():
        ranked = [(measure(best | {kind: choice}), choice) for choice in choices]
        ranked.sort(key=lambda pair: pair[0])
        best[kind] = ranked[0][1]
        yield kind, ranked


def main(
    batch: Annotated[int, typer.Option(min=1, max=32, help="Rows of the batch.")] = 1,
    length: Annotated[int, typer.Option(min=1, help="Tokens in the cache.")] = 2048,
    kinds: Annotated[str, typer.Option(help="Kinds of launches to search, comma-separated.")] = "",
    repeats: Annotated[int, typer.Option(min=1, help="Timed replays.")] = 9,
    shown: Annotated[int, typer.Option(min=1, help="Candidates to show of each kind, beside what is shipped.")] = 5,
) -> None:
    """Search the tiles of a decode step of LLaMA-3.1-8B."""
    if not torch.cuda.is_available():
        typer.echo("error: bench.tune needs a CUDA GPU, and torch sees none.", err=True)
        raise typer.Exit(code=2)
    console = Console(highlight=False, soft_wrap=True)
    capacity = length + 64
    shipped = shipped_choice(batch, capacity)
    tried = candidates(shipped, batch)
    wanted = [kind.strip() for kind in kinds.split(",")] if kinds else list(tried)
    if unknown := [kind for kind in wanted if kind not in tried]:
        raise typer.BadParameter(f"expected kinds out of {', '.join(tried)}, got {', '.join(unknown)!r}")
    tried = {kind: choices if kind in wanted else choices[:1] for kind, choices in tried.items()}
    layers = [make_layer(batch, capacity) for _ in range(NUM_LAYERS)]
    hidden = torch.randn(batch, 1, HIDDEN, dtype=torch.bfloat16, device="cuda")
    rotation = torch.randn(batch, 1, HEAD_DIM, dtype=torch.bfloat16, device="cuda")
    kv_range = torch.tensor([[0, length]], dtype=torch.int32, device="cuda").expand(batch, 2).contiguous()

    def microseconds(choice: dict[str, LinearTiles | DecodePlan]) -> float:
        with tuned(choice), torch.no_grad():
            timing = time_interleaved(
                {"chain": lambda chain: run_chain(chain, hidden, rotation, kv_range)}, [layers], 1, repeats
            )
        for reason in timing.failures.values():
            console.print(f"left out: {reason}")
        return timing.microseconds.get("chain", math.inf) / NUM_LAYERS

    console.print(f"us a layer, batch {batch}, {length} tokens; shipped: {microseconds(shipped):.1f}")
    try:
        for kind, ranked in descend(tried, microseconds):
            if kind in wanted:
                for place, (time, choice) in enumerate(ranked):
                    is_shipped = choice == shipped[kind]
                    if place < shown or is_shipped:
                        console.print(f"{kind:10} {time:7.1f}  {choice}{'  (shipped)' if is_shipped else ''}")
    except torch.OutOfMemoryError as error:
        typer.echo(f"error: {describe(error)}", err=True)
        raise typer.Exit(code=1) from error


if __name__ == "__main__":
    typer.run(main)
