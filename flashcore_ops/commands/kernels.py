"""Which kernel serves which operation, and why, in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from csrc_free_kernels import decode_tuning, tuning
from csrc_free_kernels.decode_tuning import MAX_DECODE_TOKENS, RingTiles
from csrc_free_kernels.tuning import Tiles
from flashcore_ops.cpu import is_served_by_sdpa

if TYPE_CHECKING:
    # It imports transformers, which takes seconds.
    from flashcore_ops.integrations.attention_layers import AttentionLayer

# The shape that the tiles of an architecture are shown for; every other shape has its own.
SHOWN_DTYPE = torch.bfloat16
SHOWN_HEAD_DIM = 128
_SHOWN_KV_HEADS, _SHOWN_GROUP = 8, 4
# And decode's, for one sequence in a cache of so many slots, on an H100's multiprocessors.
_SHOWN_SLOTS, _SHOWN_MULTIPROCESSORS = 8192, 132

_BY_PREFILL = f"over {MAX_DECODE_TOKENS} query tokens"
_BY_DECODE = f"up to {MAX_DECODE_TOKENS} query tokens"
_BY_APPEND = "new tokens into a static cache"
_BY_HOPPER = "in 16 bits, without softcap"


@dataclass(frozen=True)
class Kernel:
    """What serves one operation for tensors on one device, and why."""

    tensors_on: str
    operation: str
    kernel: str
    reason: str


def gpu_kernels(name: str, architecture: str, *, has_triton: bool) -> list[Kernel]:
    """The Triton kernels of one architecture with the tiles of the shown shape, or that there are none."""
    if not has_triton:
        return [_none(name)]
    shape = (architecture, SHOWN_DTYPE, SHOWN_HEAD_DIM)
    heads = (_SHOWN_GROUP, _SHOWN_KV_HEADS)
    tiles = _decode_tiles(*shape, *heads, has_ring=False)
    prefill = [_portable_prefill(name, *shape)]
    decode = [Kernel(name, "decode", "Triton split-KV", f"{_BY_DECODE}; {architecture}: {tiles}")]
    if tuning.is_hopper(architecture):
        ring = _decode_tiles(*shape, *heads, has_ring=True)
        prefill.append(_hopper_prefill(name, f"the same {_BY_HOPPER}; {architecture}: specialised warps"))
        decode.append(Kernel(name, "decode", "Gluon for Hopper", f"16 bits, no softcap; {architecture}: {ring}"))
    return [*prefill, *decode, _append(name)]


def gpu_kernels_of(
    layer: AttentionLayer, name: str, architecture: str, dtype: torch.dtype, *, is_fused: bool, has_triton: bool
) -> list[Kernel]:
    """The kernels that serve one kind of layer on the GPUs of one architecture.

    Args:
        layer: what the layer asks for.
        name: of the GPUs.
        architecture: such as "sm_90".
        dtype: of queries, keys and values.
        is_fused: whether FlashCore's own layers decode.
        has_triton: whether Triton is installed; without it there are no kernels.

    Example:
        >>> from flashcore_ops.integrations.attention_layers import AttentionLayer
        >>> layer = AttentionLayer(32, 8, 128, 0.1, window=0, softcap=50.0, has_sinks=False, is_causal=True)
        >>> kernels = gpu_kernels_of(layer, "cuda:0", "sm_80", torch.bfloat16, is_fused=False, has_triton=True)
        >>> [(row.operation, row.kernel) for row in kernels]
        [('prefill', 'Triton tiled'), ('decode', 'Triton split-KV'), ('append', 'Triton append')]
    """
    if not layer.is_causal:
        return [_dense(name, layer)]
    if not has_triton:
        return [_none(name)]
    fused = [_decode(name, architecture, dtype, layer, is_fused=True)] if is_fused else []
    return [
        _prefill(name, architecture, dtype, layer),
        _decode(name, architecture, dtype, layer, is_fused=False),
        *fused,
        _append(name),
    ]


def cpu_kernels_of(layer: AttentionLayer) -> list[Kernel]:
    """What serves one kind of layer on the CPU.

    Example:
        >>> from flashcore_ops.integrations.attention_layers import AttentionLayer
        >>> layer = AttentionLayer(32, 8, 128, 0.1, window=0, softcap=50.0, has_sinks=False, is_causal=True)
        >>> [(row.operation, row.kernel) for row in cpu_kernels_of(layer)]
        [('prefill, decode', 'dense float32'), ('append', 'torch copies')]
    """
    if not layer.is_causal:
        return [_dense("cpu", layer)]
    kernel, reason = "torch SDPA", "on the slots that each row sees"
    if not is_served_by_sdpa(layer.softcap, has_sinks=layer.has_sinks, has_lse=False):
        kernel, reason = "dense float32", f"{_beyond_sdpa(layer)}: all scores in memory"
    return [Kernel("cpu", "prefill, decode", kernel, reason), Kernel("cpu", "append", "torch copies", _BY_APPEND)]


def describe_tiles(tiles: Tiles | RingTiles) -> str:
    """A kernel's tiles in words: query rows by KV slots, warps a program, loads in flight or tiles held."""
    if isinstance(tiles, RingTiles):
        return f"{tiles.block_m}x{tiles.block_n} tiles, {tiles.num_warps} warps, ring of {tiles.num_slots}"
    return f"{tiles.block_m}x{tiles.block_n} tiles, {tiles.num_warps} warps, {tiles.num_stages} stages"


def kernel_rows(kernels: Sequence[Kernel]) -> list[tuple[str, ...]]:
    """The kernels as a table's rows of text."""
    return [(row.tensors_on, row.operation, row.kernel, row.reason) for row in kernels]


def _none(name: str) -> Kernel:
    return Kernel(name, "all", "none: every call raises", "triton is not installed")


def _dense(name: str, layer: AttentionLayer) -> Kernel:
    is_plain = is_served_by_sdpa(layer.softcap, has_sinks=layer.has_sinks, has_lse=False)
    way = "torch SDPA with a boolean mask" if is_plain else f"{_beyond_sdpa(layer)}: all scores in memory"
    return Kernel(name, "all", "dense path", f"attention in both directions; {way}")


def _beyond_sdpa(layer: AttentionLayer) -> str:
    return " and ".join(["softcap"] * (layer.softcap > 0) + ["sinks"] * layer.has_sinks)


def _prefill(name: str, architecture: str, dtype: torch.dtype, layer: AttentionLayer) -> Kernel:
    """The one that is chosen."""
    if not tuning.is_hopper(architecture):
        return _portable_prefill(name, architecture, dtype, layer.head_dim)
    # Imported here alone, since it needs Triton.
    from csrc_free_kernels.prefill import is_computed_by_hopper

    if is_computed_by_hopper(dtype, layer.head_dim, layer.head_dim, layer.scale, layer.softcap):
        reason = f"{_BY_PREFILL}; {architecture}: specialised warps; packed sequences: Triton tiled"
        return _hopper_prefill(name, reason)
    return _portable_prefill(name, architecture, dtype, layer.head_dim, f"; Gluon for Hopper only {_BY_HOPPER}")


def _portable_prefill(name: str, architecture: str, dtype: torch.dtype, head_dim: int, note: str = "") -> Kernel:
    tiles = describe_tiles(tuning.prefill_tiles(architecture, dtype, head_dim))
    return Kernel(name, "prefill", "Triton tiled", f"{_BY_PREFILL}; {architecture}: {tiles}{note}")


def _hopper_prefill(name: str, reason: str) -> Kernel:
    return Kernel(name, "prefill", "Gluon for Hopper", reason)


def _decode(name: str, architecture: str, dtype: torch.dtype, layer: AttentionLayer, *, is_fused: bool) -> Kernel:
    """The one that is chosen for one token."""
    group = layer.num_query_heads // layer.num_kv_heads
    has_ring = _has_ring(architecture, dtype, layer)
    shape = (architecture, dtype, layer.head_dim, group, layer.num_kv_heads)
    tiles = _decode_tiles(*shape, has_ring=has_ring)
    if is_fused:
        reason = f"rotates, appends and attends: one token a row, static cache; {architecture}: {tiles}"
        return Kernel(name, "decode", f"{'Gluon' if has_ring else 'Triton'} fused decode", reason)
    if not has_ring:
        return Kernel(name, "decode", "Triton split-KV", f"{_BY_DECODE}; {architecture}: {tiles}")
    num_tokens = min(MAX_DECODE_TOKENS, decode_tuning.max_ring_rows(layer.head_dim) // group)
    further = f"; to {MAX_DECODE_TOKENS}: Triton split-KV" if num_tokens < MAX_DECODE_TOKENS else ""
    tokens = f"up to {num_tokens} query tokens" if num_tokens > 1 else "one query token"
    return Kernel(name, "decode", "Gluon for Hopper", f"{tokens}; {architecture}: {tiles}{further}")


def _has_ring(architecture: str, dtype: torch.dtype, layer: AttentionLayer) -> bool:
    """Whether Hopper's kernels serve one token of it."""
    # Imported here alone, since it needs Triton.
    from csrc_free_kernels.shares import has_ring

    head_dim, num_rows = layer.head_dim, layer.num_query_heads // layer.num_kv_heads
    return tuning.is_hopper(architecture) and has_ring(
        dtype, head_dim, head_dim, num_rows=num_rows, scale=layer.scale, softcap=layer.softcap
    )


def _decode_tiles(
    architecture: str, dtype: torch.dtype, head_dim: int, group: int, num_kv_heads: int, *, has_ring: bool
) -> str:
    plan = decode_tuning.plan_decode(
        *(architecture, dtype, head_dim),
        num_rows=group,
        num_heads=num_kv_heads,
        kv_len=_SHOWN_SLOTS,
        num_multiprocessors=_SHOWN_MULTIPROCESSORS,
        has_ring=has_ring,
    )
    return describe_tiles(plan.tiles)


def _append(name: str) -> Kernel:
    return Kernel(name, "append", "Triton append", _BY_APPEND)
