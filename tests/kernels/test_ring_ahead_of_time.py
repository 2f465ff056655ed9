"""What Hopper's split-KV kernels compile to: within the chip's limits, and nothing but prefetches before the wait."""

from __future__ import annotations

import itertools
import re

import pytest
import torch

pytest.importorskip("triton")

from csrc_free_kernels import decode, decode_tuning, shares
from tests.kernels.ahead_of_time import CompiledKernel, check_limits, compiled_for, decode_plans
from tests.kernels.test_ahead_of_time import compile_rope

DTYPES = [torch.float16, torch.bfloat16]
HEAD_DIMS = [16, 64, 80, 96, 128, 192, 256]
MEMORY_ACCESS = re.compile(r"\b(?:ld|st|cp\.async)\S*\.global\S*|\bld\.volatile\S*")


def compile_attention(
    dtype: torch.dtype, head_dim: int, query_len: int = 1, group: int = 4, window: int = 0, has_range: bool = True
) -> list[CompiledKernel]:
    """Attention of 2 KV heads."""
    query = torch.empty(1, query_len, 2 * group, head_dim, dtype=dtype).transpose(1, 2)
    key = torch.empty(1, 2, 512, head_dim, dtype=dtype)
    with compiled_for("sm_90") as compiled:
        for plan in decode_plans("sm_90", dtype, head_dim, num_rows=group * query_len, has_ring=True):
            decode.decode_attention(
                *(query, key, key, torch.empty_like(query), torch.empty(1, 2 * group, query_len)),
                kv_range=torch.zeros(1, 2, dtype=torch.int32) if has_range else None,
                sinks=torch.empty(2 * group),
                scale=0.1,
                is_causal=True,
                window=window,
                softcap=0.0,
                plan=plan,
                is_dependent=True,
            )
    return compiled


@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_one_token(head_dim: int) -> None:
    compiled = compile_attention(torch.bfloat16, head_dim) + compile_rope(
        "sm_90", torch.bfloat16, head_dim, has_ring=True
    )
    check_limits("sm_90", torch.bfloat16, compiled)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_as_many_rows_as_registers_hold(head_dim: int) -> None:
    query_len = decode_tuning.max_ring_rows(head_dim) // 4
    check_limits("sm_90", torch.bfloat16, compile_attention(torch.bfloat16, head_dim, query_len, window=9))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_full_product(dtype: torch.dtype, head_dim: int) -> None:
    most = decode_tuning.max_ring_rows(head_dim)
    shapes = {(1, 1), (1, 8), (2, most // 2), (1, most), (most // 2, 2), (most // 7, 7)}
    for (query_len, group), window, has_range in itertools.product(sorted(shapes), (0, 9), (True, False)):
        check_limits("sm_90", dtype, compile_attention(dtype, head_dim, query_len, group, window, has_range))
    for group, window in itertools.product((1, 7, most), (0, 9)):
        check_limits("sm_90", dtype, compile_rope("sm_90", dtype, head_dim, group, window, has_ring=True))


def test_kernels_wait_before_they_touch_memory() -> None:
    kernels = compile_attention(torch.bfloat16, 128) + compile_rope("sm_90", torch.bfloat16, 128, has_ring=True)
    assert {kernel.name for kernel in kernels} == {"_decode_kernel", "_rope_decode_kernel", "_combine_kernel"}
    for kernel in kernels:
        before, waits, after = kernel.assembly.partition("griddepcontrol.wait")
        assert waits, kernel.name
        assert "griddepcontrol.launch_dependents" in kernel.assembly, kernel.name
        if kernel.name == "_combine_kernel":
            assert not MEMORY_ACCESS.search(before)
            continue
        # The range as it was, which every warp must find alike: all take it out of shared memory.
        hints = re.findall(r"ld\.volatile\.global\S* .*\[ (%rd\d+) ", before)
        assert len(hints) == len(MEMORY_ACCESS.findall(before)) == 2, kernel.name
        assert re.search(r"ld\.volatile.*st\.shared.*bar\.sync.*ld\.shared", before, re.DOTALL), kernel.name
        # And as it is, from the same addresses.
        for address in hints:
            assert re.search(rf"ld\.global\S* .*\[ {address} ", after), kernel.name


def test_copies_of_16_bytes_that_the_compiler_can_prove() -> None:
    def served(key: torch.Tensor, group: int = 4, scale: float = 0.1, softcap: float = 0.0) -> bool:
        query = torch.empty(1, key.shape[1] * group, 1, key.shape[3], dtype=key.dtype)
        return shares.is_served_by_ring(query, key, key, scale, softcap)

    def cache(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16)

    key = cache(1, 2, 512, 128)
    assert served(key)
    assert served(key, group=32)
    assert served(key.transpose(1, 2).contiguous().transpose(1, 2))
    assert served(key[:, :1].expand(-1, 2, -1, -1))
    assert served(cache(1, 2, 512, 80))
    assert not served(key, group=33)
    assert not served(key.float())
    assert not served(key, softcap=30.0)
    assert not served(key, scale=-0.1)
    assert not served(cache(1, 2, 512, 72))
    assert not served(cache(1, 2, 512, 136)[..., :128])
    assert not served(cache(1, 2, 512, 144)[..., 4:132])
    assert not served(torch.empty_strided((1, 2, 3, 128), (0, 0, 2**24, 1), dtype=torch.bfloat16, device="meta"))
    query = torch.empty(1, 8, 1, 128, dtype=torch.bfloat16)
    assert not shares.is_served_by_ring(query, key, key[..., :64], 0.1, softcap=0.0)
