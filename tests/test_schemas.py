"""The public surface: op schemas, tags and names."""

from __future__ import annotations

import inspect

import pytest
import torch

import flashcore_ops
from tests.snapshots import assert_expected_inline

OPS = ("attention", "attention_with_lse", "append_kv_", "linear", "rope_append_attention")


def test_schemas():
    schemas = "\n".join(str(getattr(torch.ops.flashcore, name).default._schema) for name in OPS)
    schemas = schemas.replace(", ", ",\n  ")
    assert_expected_inline(
        schemas,
        """\
flashcore::attention(Tensor query,
  Tensor key,
  Tensor value,
  Tensor? kv_range=None,
  float? scale=None,
  bool is_causal=True,
  int window=0,
  float softcap=0.,
  Tensor? sinks=None,
  int num_splits=0,
  Tensor? cu_seqlens_q=None) -> Tensor
flashcore::attention_with_lse(Tensor query,
  Tensor key,
  Tensor value,
  Tensor? kv_range=None,
  float? scale=None,
  bool is_causal=True,
  int window=0,
  float softcap=0.,
  Tensor? sinks=None,
  int num_splits=0,
  Tensor? cu_seqlens_q=None) -> (Tensor,
  Tensor)
flashcore::append_kv_(Tensor(a!) key_cache,
  Tensor(b!) value_cache,
  Tensor key,
  Tensor value,
  Tensor positions) -> ()
flashcore::linear(Tensor input,
  Tensor[] weights,
  Tensor? norm_weight=None,
  float eps=9.9999999999999995e-07,
  Tensor? residual=None,
  bool is_gated=False,
  bool has_constant_weights=False) -> Tensor
flashcore::rope_append_attention(Tensor query,
  Tensor key,
  Tensor value,
  Tensor cos,
  Tensor sin,
  Tensor(a!) key_cache,
  Tensor(b!) value_cache,
  Tensor kv_range,
  float? scale=None,
  int window=0,
  float softcap=0.,
  Tensor? sinks=None,
  int num_splits=0,
  Tensor? next_weight=None) -> Tensor""",
    )


def test_public_names():
    assert_expected_inline(
        "\n".join(flashcore_ops.__all__),
        """\
FlashCoreError
append_kv_
attention
attention_with_kv_cache
attention_with_lse
free_kept_caches
is_patched
linear
make_static_cache
patch_model
replace_llama_attention_with_flashcore
restore_attention
rope_append_attention
warmup""",
    )


@pytest.mark.parametrize("name", OPS)
def test_tags(name):
    tags = getattr(torch.ops.flashcore, name).default.tags
    assert {torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag} <= set(tags)
    assert torch.Tag.cudagraph_unsafe not in tags


@pytest.mark.parametrize("name", OPS)
def test_python_face_takes_the_schemas_arguments_with_its_defaults(name):
    parameters = inspect.signature(getattr(flashcore_ops, name)).parameters
    arguments = getattr(torch.ops.flashcore, name).default._schema.arguments
    assert list(parameters) == [argument.name for argument in arguments]
    for argument in arguments:
        default = parameters[argument.name].default
        assert default == (argument.default_value if argument.has_default_value() else inspect.Parameter.empty)
