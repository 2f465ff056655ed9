"""The kernels' tanh, which softcapped scores pass through, against float64."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from csrc_free_kernels import softmax


@triton.jit
def _tanh_kernel(p_x, p_y, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(p_y + o, softmax._tanh(tl.load(p_x + o)))


def test_tanh_keeps_its_documented_accuracy(kernel_device):
    magnitudes = torch.logspace(-30, 4, 4096, base=2.0)
    x = torch.cat([magnitudes, -magnitudes]).to(kernel_device)
    y = torch.full_like(x, torch.nan)
    _tanh_kernel[(8,)](x, y, BLOCK=1024)
    exact = torch.tanh(x.double())
    assert ((y.double() - exact) / exact).abs().max() <= 3 * torch.finfo(torch.float32).eps
