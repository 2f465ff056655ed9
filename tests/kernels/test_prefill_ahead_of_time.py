"""What prefill compiles to on Hopper: warp-group products in both kernels, and copies by specialised warps in one."""

from __future__ import annotations

import re

import pytest
import torch

pytest.importorskip("triton")

from csrc_free_kernels import prefill, tuning
from csrc_free_kernels.tuning import HopperTiles, Tiles
from tests.kernels.ahead_of_time import CompiledKernel, check_limits, compiled_for

DTYPES = [torch.float16, torch.bfloat16]
HEAD_DIMS = [64, 128, 256]


def compile_prefill(
    dtype: torch.dtype,
    head_dim: int,
    tiles: Tiles | HopperTiles,
    has_options: bool = False,
    window: int = 0,
    is_causal: bool = True,
) -> CompiledKernel:
    """The kernel for 8:2 heads."""
    query = torch.empty(1, 200, 8, head_dim, dtype=dtype).transpose(1, 2)
    key = torch.empty(1, 512, 2, head_dim, dtype=dtype).transpose(1, 2)
    with compiled_for("sm_90") as compiled:
        prefill.prefill_attention(
            *(query, key, key, torch.empty_like(query), torch.empty(1, 8, 200) if has_options else None),
            kv_range=torch.zeros(1, 2, dtype=torch.int32) if has_options else None,
            sinks=torch.empty(8) if has_options else None,
            scale=0.1,
            is_causal=is_causal,
            window=window,
            softcap=0.0,
            cu_seqlens=None,
            tiles=tiles,
            section_heads=4,
        )
    check_limits("sm_90", dtype, compiled)
    (kernel,) = compiled
    return kernel


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_the_portable_kernel_uses_wgmma(dtype, head_dim):
    kernel = compile_prefill(dtype, head_dim, tuning.prefill_tiles("sm_90", dtype, head_dim))
    assert "wgmma.mma_async" in kernel.assembly


def check_hoppers_kernel(kernel: CompiledKernel, block_n: int) -> None:
    # Two groups multiply: scores of the first tile and of the others, values of the others and of the last.
    assert len(re.findall(r"wgmma\.wait_group\S* 0;", kernel.assembly)) == 2 * 3
    assert len(re.findall(r"wgmma\.wait_group\S* 1;", kernel.assembly)) == 2
    assert f"wgmma.mma_async.sync.aligned.m64n{block_n}k16" in kernel.assembly
    assert "cp.async.bulk.tensor.4d.shared::cluster.global" in kernel.assembly
    assert "cp.async.bulk.tensor.4d.global.shared::cta" in kernel.assembly
    assert "setmaxnreg.dec" in kernel.assembly
    # What a thread stores itself is the log of its row's sum, and nothing else.
    assert not re.findall(r"\bst\.global\S*\.v\d", kernel.assembly)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_hoppers_kernel_specialises_its_warps(dtype, head_dim):
    tiles = tuning.hopper_prefill_tiles(head_dim, num_multiprocessors=132)
    check_hoppers_kernel(compile_prefill(dtype, head_dim, tiles, has_options=True), tiles.block_n)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("has_options", [False, True])
@pytest.mark.parametrize(("is_causal", "window"), [(True, 0), (True, 100), (False, 0)])
def test_hoppers_kernel_full_product(dtype, head_dim, has_options, is_causal, window):
    tiles = tuning.hopper_prefill_tiles(head_dim, num_multiprocessors=132)
    kernel = compile_prefill(dtype, head_dim, tiles, has_options=has_options, window=window, is_causal=is_causal)
    check_hoppers_kernel(kernel, tiles.block_n)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_hoppers_kernel_spills_nothing_with_a_range_alone(head_dim: int) -> None:
    """Sizes divisible by 16, as the compiler then knows more: this spilled where options and odd sizes did not."""
    query = torch.empty(1, 32, 2048, head_dim, dtype=torch.bfloat16)
    key = torch.empty(1, 8, 2048, head_dim, dtype=torch.bfloat16)
    with compiled_for("sm_90") as compiled:
        prefill.prefill_attention(
            *(query, key, key, torch.empty_like(query), None),
            kv_range=torch.zeros(1, 2, dtype=torch.int32),
            sinks=None,
            scale=0.1,
            is_causal=True,
            window=0,
            softcap=0.0,
            cu_seqlens=None,
            tiles=tuning.hopper_prefill_tiles(head_dim, num_multiprocessors=132),
            section_heads=4,
        )
    check_limits("sm_90", torch.bfloat16, compiled)


def test_hopper_serves_what_its_copy_engine_can_address() -> None:
    def served(
        query: torch.Tensor,
        key: torch.Tensor,
        scale: float = 0.1,
        softcap: float = 0.0,
        cu_seqlens: torch.Tensor | None = None,
    ) -> bool:
        return prefill.is_served_by_hopper(query, key, key, scale, softcap, cu_seqlens)

    query = torch.empty(1, 200, 8, 128, dtype=torch.bfloat16).transpose(1, 2)
    key = torch.empty(1, 512, 2, 128, dtype=torch.bfloat16).transpose(1, 2)
    assert served(query, key)
    assert not served(query.float(), key.float())
    assert not served(query, key, softcap=30.0)
    assert not served(query, key, cu_seqlens=torch.tensor([0, 200], dtype=torch.int32))
    assert not served(query, key, scale=-0.1)
    assert not served(query, key, scale=0.0)
    assert not served(query, key[:, :, :0])
    assert not served(query, key[:, :1].expand(-1, 2, -1, -1))
    assert not served(query, torch.empty(1, 2, 512, 132, dtype=torch.bfloat16)[..., :128])
    assert not served(query, torch.empty(1, 2, 512, 136, dtype=torch.bfloat16)[..., 1:129])
    assert not prefill.is_served_by_hopper(query, key, key[..., :64], 0.1, softcap=0.0, cu_seqlens=None)
