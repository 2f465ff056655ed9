"""The reference against definitions written out by hand, and against torch's own attention."""

from __future__ import annotations

import math

import pytest
import torch

from flashcore_ops import reference
from tests.problems import make_problem


@pytest.mark.parametrize(
    ("query_len", "kv_len", "kv_range", "is_causal", "window", "expected"),
    [
        (2, 5, None, True, 0, ["11110", "11111"]),
        (5, 2, None, True, 0, ["00", "00", "00", "10", "11"]),
        (2, 5, (0, 4), True, 0, ["11100", "11110"]),
        (2, 5, (1, 5), True, 0, ["01110", "01111"]),
        (2, 5, None, True, 2, ["00110", "00011"]),
        (2, 5, None, False, 0, ["11111", "11111"]),
        (3, 5, (1, 3), True, 0, ["00000", "01000", "01100"]),
        (2, 5, (1, 3), False, 0, ["01100", "01100"]),
        (2, 5, (-7, 99), True, 0, ["11110", "11111"]),
        (2, 5, (4, 2), True, 0, ["00000", "00000"]),
        (1, 0, None, True, 0, [""]),
    ],
)
def test_visible_slots(query_len, kv_len, kv_range, is_causal, window, expected):
    tensor = None if kv_range is None else torch.tensor([kv_range], dtype=torch.int32)
    visible = reference.visible_slots(query_len, kv_len, tensor, is_causal, window)
    assert ["".join(str(int(cell)) for cell in row) for row in visible[0]] == expected


def test_equals_torch_where_the_meanings_agree():
    problem = make_problem(query_len=7, kv_len=7).in_float64()
    output, _ = reference.attention_with_lse(*problem.arguments())
    expected = torch.nn.functional.scaled_dot_product_attention(
        problem.query, problem.key, problem.value, is_causal=True, enable_gqa=True
    )
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12)


def test_softcap_is_applied_after_scale_and_before_mask_and_sinks_are_left_alone():
    query = torch.tensor([3.0, 4.0], dtype=torch.float64).view(1, 1, 1, 2)
    key = torch.tensor([[1.0, 0.0], [0.0, 1.0], [9.0, 9.0]], dtype=torch.float64).view(1, 1, 3, 2)
    value = torch.tensor([10.0, 20.0, 30.0], dtype=torch.float64).view(1, 1, 3, 1)
    kv_range = torch.tensor([[0, 2]], dtype=torch.int32)
    sinks = torch.tensor([0.7], dtype=torch.float64)
    output, lse = reference.attention_with_lse(
        query, key, value, kv_range, scale=0.5, softcap=2.0, sinks=sinks, is_causal=False
    )
    weights = [math.exp(2 * math.tanh(3 * 0.5 / 2)), math.exp(2 * math.tanh(4 * 0.5 / 2))]
    total = sum(weights) + math.exp(0.7)
    assert output.item() == pytest.approx((10 * weights[0] + 20 * weights[1]) / total, rel=1e-12)
    assert lse.item() == pytest.approx(math.log(total), rel=1e-12)


def test_row_that_sees_nothing_is_zero_and_its_lse_is_its_sink():
    problem = make_problem(num_query_heads=2, kv_range=[(3, 3), (0, 2)], query_len=4, kv_len=6)
    output, lse = reference.attention_with_lse(*problem.arguments())
    assert (output[0] == 0).all()
    assert (output[1, :, :2] == 0).all()
    assert (output[1, :, 2:] != 0).any()
    assert torch.isneginf(lse[0]).all()
    sinks = torch.tensor([0.5, -1.5])
    _, lse = reference.attention_with_lse(problem.query, problem.key, problem.value, problem.kv_range, sinks=sinks)
    assert torch.equal(lse[0], sinks[:, None].expand(2, 4))


def test_rotation_equals_transformers():
    modeling_llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    query, key = torch.randn(2, 4, 3, 32, dtype=torch.float64), torch.randn(2, 2, 3, 32, dtype=torch.float64)
    angles = torch.rand(2, 3, 16, dtype=torch.float64).repeat(1, 1, 2)
    rotated = [reference.rotate(x, angles.cos(), angles.sin()) for x in (query, key)]
    expected = modeling_llama.apply_rotary_pos_emb(query, key, angles.cos(), angles.sin())
    assert torch.equal(rotated[0], expected[0])
    assert torch.equal(rotated[1], expected[1])


def test_rotation_of_16_bits_is_rounded_once():
    x, angles = torch.randn(2, 4, 1, 32, dtype=torch.bfloat16), torch.rand(2, 1, 32)
    cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()
    assert torch.equal(reference.rotate(x, cos, sin), reference.rotate(x.float(), cos.float(), sin.float()).bfloat16())
