"""Every kernel compiles for every architecture we name, within its limits, without a GPU."""

from __future__ import annotations

import itertools
import re

import pytest
import torch

pytest.importorskip("triton")

from csrc_free_kernels import (
    argmax,
    decode,
    decode_tuning,
    kv_append,
    linear,
    linear_tuning,
    prefill,
    rope_decode,
    step_input,
    tuning,
)
from tests.kernels.ahead_of_time import TARGETS, CompiledKernel, check_limits, compiled_for, decode_plans

HALF, FLOAT = torch.float16, torch.float32


def compile_attention(
    arch: str,
    dtype: torch.dtype,
    head_dim: int,
    query_len: int,
    is_causal: bool = True,
    window: int = 0,
    softcap: float = 0.0,
    cu_seqlens: torch.Tensor | None = None,
) -> list[CompiledKernel]:
    """Compiles what the CUDA path would launch for 8:2 heads."""
    query = torch.empty(1, query_len, 8, head_dim, dtype=dtype).transpose(1, 2)
    key = torch.empty(1, 2, 512, head_dim, dtype=dtype)
    output, lse = torch.empty_like(query), torch.empty(1, 8, query_len)
    options = {
        "kv_range": torch.zeros(1, 2, dtype=torch.int32),
        "sinks": torch.empty(8),
        "scale": 0.1,
        "is_causal": is_causal,
        "window": window,
        "softcap": softcap,
    }
    with compiled_for(arch) as compiled:
        if query_len > decode_tuning.MAX_DECODE_TOKENS or cu_seqlens is not None:
            tiles = tuning.prefill_tiles(arch, dtype, head_dim)
            order = {"tiles": tiles, "section_heads": 4}
            prefill.prefill_attention(query, key, key, output, lse, **options, cu_seqlens=cu_seqlens, **order)
        else:
            is_dependent = tuning.supports_dependent_launch(arch)
            for plan in decode_plans(arch, dtype, head_dim, num_rows=4 * query_len):
                decode.decode_attention(query, key, key, output, lse, **options, plan=plan, is_dependent=is_dependent)
    return compiled


def compile_rope(
    arch: str,
    dtype: torch.dtype,
    head_dim: int,
    group: int = 4,
    window: int = 0,
    softcap: float = 0.0,
    has_ring: bool = False,
) -> list[CompiledKernel]:
    """Compiles what the CUDA path would launch for the fused decode of 2 KV heads, query to value in one buffer."""
    heads = torch.empty(1, 2 * group + 4, 1, head_dim, dtype=dtype).split([2 * group, 2, 2], dim=1)
    rotation, cache = torch.empty(1, 1, head_dim, dtype=dtype), torch.empty(1, 2, 512, head_dim, dtype=dtype)
    with compiled_for(arch) as compiled:
        for plan in decode_plans(arch, dtype, head_dim, num_rows=group, has_ring=has_ring):
            rope_decode.rope_append_attention(
                *(*heads, rotation, rotation, cache, cache, torch.empty(1, 2 * group, 1, head_dim, dtype=dtype)),
                kv_range=torch.zeros(1, 2, dtype=torch.int32),
                sinks=torch.empty(2 * group),
                scale=0.1,
                window=window,
                softcap=softcap,
                next_weight=torch.empty(4096, 4096, dtype=dtype),
                plan=plan,
                is_dependent=tuning.supports_dependent_launch(arch),
            )
    return compiled


@pytest.mark.parametrize("arch", TARGETS)
@pytest.mark.parametrize(
    ("dtype", "head_dim", "query_len", "options"),
    [
        (torch.bfloat16, 128, 200, {}),
        (torch.bfloat16, 128, 1, {}),
        (HALF, 64, 200, {"window": 9, "softcap": 3.0}),
        (HALF, 64, 16, {"window": 9, "softcap": 3.0}),
        (HALF, 256, 200, {"window": 9, "softcap": 3.0}),
        (HALF, 256, 16, {"window": 9, "softcap": 3.0}),
        (FLOAT, 128, 200, {}),
        (FLOAT, 128, 1, {}),
    ],
    ids=str,
)
def test_representative_set(arch, dtype, head_dim, query_len, options):
    check_limits(arch, dtype, compile_attention(arch, dtype, head_dim, query_len, **options))


@pytest.mark.parametrize("arch", TARGETS)
@pytest.mark.parametrize("num_sequences", [1, 1000])
def test_packed_sequences(arch, num_sequences):
    cu_seqlens = torch.zeros(num_sequences + 1, dtype=torch.int32)
    check_limits(arch, HALF, compile_attention(arch, HALF, 128, query_len=200, cu_seqlens=cu_seqlens))


@pytest.mark.slow
@pytest.mark.parametrize("arch", TARGETS)
@pytest.mark.parametrize("dtype", [HALF, torch.bfloat16, FLOAT], ids=str)
@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128, 192, 256])
def test_full_product(arch, dtype, head_dim):
    for query_len, window, softcap in itertools.product((200, 1, 16), (0, 9), (0.0, 3.0)):
        compiled = compile_attention(arch, dtype, head_dim, query_len, window=window, softcap=softcap)
        check_limits(arch, dtype, compiled)
    for query_len in (200, 1, 16):
        check_limits(arch, dtype, compile_attention(arch, dtype, head_dim, query_len, is_causal=False))


@pytest.mark.parametrize(
    ("arch", "dtype", "head_dim"),
    [
        *(("sm_90", torch.bfloat16, head_dim) for head_dim in (64, 128, 256)),
        *((arch, dtype, 128) for arch in TARGETS for dtype in (HALF, FLOAT)),
    ],
    ids=str,
)
def test_rope(arch, dtype, head_dim):
    check_limits(arch, dtype, compile_rope(arch, dtype, head_dim))


@pytest.mark.slow
@pytest.mark.parametrize("arch", TARGETS)
@pytest.mark.parametrize("dtype", [HALF, torch.bfloat16, FLOAT], ids=str)
@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128, 192, 256])
def test_full_product_of_rope(arch, dtype, head_dim):
    for group, window, softcap in itertools.product((4, 64), (0, 9), (0.0, 3.0)):
        compiled = compile_rope(arch, dtype, head_dim, group=group, window=window, softcap=softcap)
        check_limits(arch, dtype, compiled)


@pytest.mark.parametrize("arch", ["sm_90", "sm_100"])
def test_dependent_kernels_wait_before_they_touch_memory(arch):
    kernels = compile_attention(arch, torch.bfloat16, 128, query_len=1) + compile_rope(arch, torch.bfloat16, 128)
    assert {kernel.name for kernel in kernels} == {"_decode_kernel", "_rope_decode_kernel", "_combine_kernel"}
    for kernel in kernels:
        before, waits, after = kernel.assembly.partition("griddepcontrol.wait")
        assert waits, kernel.name
        assert "griddepcontrol.launch_dependents" in kernel.assembly, kernel.name
        # The prefetched lines' addresses come from two loads of the range, which is read again for its values.
        expected = 0 if kernel.name == "_combine_kernel" else 2
        accesses = MEMORY_ACCESS.findall(before)
        assert [access.startswith("ld.volatile") for access in accesses] == [True] * expected, kernel.name
        assert MEMORY_ACCESS.search(after), kernel.name


@pytest.mark.parametrize("arch", TARGETS)
def test_append(arch):
    cache, tokens = torch.empty(2, 2, 64, 128, dtype=HALF), torch.empty(2, 2, 1, 128, dtype=HALF)
    with compiled_for(arch) as compiled:
        kv_append.append_kv_(cache, cache, tokens, tokens, torch.zeros(2, dtype=torch.int64))
    check_limits(arch, HALF, compiled)


@pytest.mark.parametrize("arch", TARGETS)
def test_the_ends_of_a_step(arch):
    tokens, row = torch.zeros(2, 1, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    is_dependent = tuning.supports_dependent_launch(arch)
    with compiled_for(arch) as compiled:
        argmax.argmax(torch.empty(2, 128_256, dtype=HALF), tokens, is_dependent=is_dependent)
    check_limits(arch, HALF, compiled)
    with compiled_for(arch) as compiled:
        step_input.step_input(
            *(tokens, row.int(), row, row[0]),
            embedding=torch.empty(128_256, 4096, dtype=HALF),
            inv_freq=torch.empty(64),
            attention_scaling=1.0,
            hidden=torch.empty(2, 1, 4096, dtype=HALF),
            cos=torch.empty(2, 1, 128, dtype=HALF),
            sin=torch.empty(2, 1, 128, dtype=HALF),
            kv_range=torch.empty(2, 2, dtype=torch.int32),
            is_dependent=is_dependent,
        )
    (kernel,) = compiled
    # The exact sine reduces large angles on the stack; the approximate one knows no large angles.
    assert kernel.stack_bytes <= 32
    assert kernel.spilled_registers == 0
    assert not re.search(r"(cos|sin)\.approx", kernel.assembly)


MEMORY_ACCESS = re.compile(r"\b(?:ld(?:\.volatile)?\.global\S*|cp\.async\.c\S*|st\.global\S*|atom\S*|red\.\S*)")


@pytest.mark.parametrize("num_rows", [1, 8])
@pytest.mark.parametrize("layer", ["qkv", "gate_up", "down"])
def test_weights_that_may_change_are_read_after_the_wait(layer, num_rows):
    (kernel,) = compile_linear("sm_90", torch.bfloat16, num_rows, layer, has_constant_weights=False)
    before, _, after = kernel.assembly.partition("griddepcontrol.wait")
    assert not MEMORY_ACCESS.findall(before)
    assert MEMORY_ACCESS.findall(after)


def test_gated_weights_may_lie_far_apart():
    """Read through a pointer that the AMD compiler takes to stay within 2 GB, the second weight would be wrong."""
    (kernel,) = compile_linear("gfx942", torch.bfloat16, 1, "gate_up")
    assert len(re.findall(r"global_load_\w+", kernel.assembly)) >= 8


# Llama 3.1 8B: (K, the weights' rows, what rides along).
LINEAR_LAYERS = {
    "qkv": (4096, (4096, 1024, 1024), {"has_norm": True}),
    "o": (4096, (4096,), {"has_residual": True}),
    "gate_up": (4096, (14336, 14336), {"has_norm": True, "is_gated": True}),
    "down": (14336, (4096,), {"has_residual": True}),
}


def compile_linear(
    arch: str, dtype: torch.dtype, num_rows: int, layer: str, has_constant_weights: bool = True
) -> list[CompiledKernel]:
    """Compiles what the CUDA path would launch for a linear layer."""
    depth, sizes, options = LINEAR_LAYERS[layer]
    is_gated = options.get("is_gated", False)
    rows = torch.empty(num_rows, depth, dtype=dtype)
    output = torch.empty(num_rows, sizes[0] if is_gated else sum(sizes), dtype=dtype)
    with compiled_for(arch) as compiled:
        linear.linear(
            rows,
            [torch.empty(size, depth, dtype=dtype) for size in sizes],
            output,
            norm_weight=torch.empty(depth, dtype=dtype) if options.get("has_norm") else None,
            eps=1e-5,
            residual=torch.empty_like(output) if options.get("has_residual") else None,
            is_gated=is_gated,
            has_constant_weights=has_constant_weights,
            tiles=linear_tuning.linear_tiles(
                arch,
                dtype,
                num_rows=num_rows,
                num_columns=sum(sizes),
                depth=depth,
                num_multiprocessors=132,
                is_aligned=True,
            ),
            is_dependent=tuning.supports_dependent_launch(arch),
        )
    return compiled


def check_linear(arch: str, dtype: torch.dtype, num_rows: int, layer: str) -> None:
    compiled = compile_linear(arch, dtype, num_rows, layer)
    check_limits(arch, dtype, compiled)
    for kernel in compiled:
        before, wait, after = kernel.assembly.partition("griddepcontrol.wait")
        assert bool(wait) == (arch in ("sm_90", "sm_100")), f"{arch} {kernel.name}: dependent launch"
        if wait:
            assert "griddepcontrol.launch_dependents" in before
            # What there is besides constant weights the kernel ahead may still be writing. These are marked as read
            # once in the kernel for one row; the ring's copies test_hopper_reads_weights_by_16_bytes counts.
            accesses = MEMORY_ACCESS.findall(before)
            if kernel.name == "row_kernel":
                assert accesses
                assert all("evict_first" in access for access in accesses), kernel.name
            elif kernel.name == "ring_kernel":
                assert set(accesses) == {"cp.async.cg.shared.global"}
            else:
                assert not accesses, kernel.name
            assert re.search(r"\bst\.global", after)


@pytest.mark.parametrize("arch", TARGETS)
@pytest.mark.parametrize(
    ("layer", "dtype", "num_rows"),
    [
        ("qkv", torch.bfloat16, 1),
        ("gate_up", torch.bfloat16, 1),
        ("down", torch.bfloat16, 1),
        ("gate_up", torch.bfloat16, 8),
        ("down", torch.bfloat16, 32),
        ("gate_up", HALF, 32),
        ("gate_up", FLOAT, 8),
    ],
    ids=str,
)
def test_linear(arch, layer, dtype, num_rows):
    check_linear(arch, dtype, num_rows, layer)


@pytest.mark.slow
@pytest.mark.parametrize("arch", TARGETS)
@pytest.mark.parametrize("dtype", [HALF, torch.bfloat16, FLOAT], ids=str)
@pytest.mark.parametrize("num_rows", [1, 8, 32])
@pytest.mark.parametrize("layer", LINEAR_LAYERS)
def test_linear_full_product(arch, layer, dtype, num_rows):
    check_linear(arch, dtype, num_rows, layer)


@pytest.mark.parametrize("layer", ["qkv", "gate_up", "down"])
def test_hopper_reads_weights_by_16_bytes(layer):
    """Before the wait: for one row eight 16-byte loads a thread, for more all slots of the ring but one."""
    (row_kernel,) = compile_linear("sm_90", torch.bfloat16, 1, layer)
    before, _, _ = row_kernel.assembly.partition("griddepcontrol.wait")
    weight_loads = re.findall(r"ld\.global\.L1::evict_first\S*", before)
    assert len(weight_loads) == 8
    assert all(load.endswith(".v4.b32") for load in weight_loads)

    depth, sizes, _ = LINEAR_LAYERS[layer]
    tiles = linear_tuning.linear_tiles(
        "sm_90",
        torch.bfloat16,
        num_rows=8,
        num_columns=sum(sizes),
        depth=depth,
        num_multiprocessors=132,
        is_aligned=True,
    )
    (ring_kernel,) = compile_linear("sm_90", torch.bfloat16, 8, layer)
    before, _, after = ring_kernel.assembly.partition("griddepcontrol.wait")
    slot_bytes = tiles.block_n * tiles.block_k * torch.bfloat16.itemsize
    copies = re.findall(r"cp\.async\.\S* [^;]*", before)
    assert len(copies) == (tiles.num_stages - 1) * slot_bytes // (16 * 32 * tiles.num_warps)
    copies += re.findall(r"cp\.async\.c[ag]\S* [^;]*", after)
    assert all("], 0x10, " in copy for copy in copies)
    assert "ldmatrix" in after
    assert "mma.sync" in after
