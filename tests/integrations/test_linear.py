"""On the CPU the linear op computes what transformers' modules compute, bit by bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from flashcore_ops import linear
from tests.problems import DTYPES

HIDDEN, INTERMEDIATE = 96, 200

pytestmark = [
    pytest.mark.parametrize("dtype", DTYPES, ids=str),
    pytest.mark.parametrize("shape", [(1, 1), (4, 1), (2, 13)], ids=str),
]


def make_hidden(shape: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, LlamaRMSNorm]:
    norm = LlamaRMSNorm(HIDDEN, eps=1e-3).to(dtype)
    torch.nn.init.normal_(norm.weight)
    return torch.randn(*shape, HIDDEN, dtype=dtype), norm


@torch.no_grad()
def test_norm_and_projections(dtype, shape):
    hidden, norm = make_hidden(shape, dtype)
    projections = [torch.nn.Linear(HIDDEN, size, bias=False, dtype=dtype) for size in (96, 32, 32)]
    expected = [projection(norm(hidden)) for projection in projections]
    output = linear(hidden, [each.weight for each in projections], norm.weight, norm.variance_epsilon)
    assert torch.equal(output, torch.cat(expected, dim=-1))


@torch.no_grad()
def test_norm_mlp_and_residual(dtype, shape):
    hidden, norm = make_hidden(shape, dtype)
    mlp = LlamaMLP(LlamaConfig(hidden_size=HIDDEN, intermediate_size=INTERMEDIATE)).to(dtype)
    pair = [mlp.gate_proj.weight, mlp.up_proj.weight]
    gated = linear(hidden, pair, norm.weight, norm.variance_epsilon, is_gated=True)
    output = linear(gated, [mlp.down_proj.weight], residual=hidden)
    assert torch.equal(output, hidden + mlp(norm(hidden)))
