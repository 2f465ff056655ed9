"""Fused decoder layers: bit for bit their parents', and out of the way of whatever someone put into the model."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from flashcore_ops import make_static_cache
from flashcore_ops.errors import GradientError, OptionError
from flashcore_ops.integrations.capture import is_capturable
from flashcore_ops.integrations.decoder_layer import (
    FlashCoreDecoderLayer,
    FlashCoreLinear,
    unfuse_modules,
)
from flashcore_ops.integrations.generate import KeptGeneration
from flashcore_ops.integrations.transformers import replace_llama_attention_with_flashcore as patch
from flashcore_ops.integrations.transformers import restore_attention
from tests.integrations.models import FUSED_FAMILIES, PROMPT_LEN, VOCABULARY, make_batch, make_model

CACHES: dict[str, Callable[..., Any]] = {
    "static": lambda model, batch: make_static_cache(model, batch, 24),
    "dynamic": lambda model, batch: DynamicCache(config=model.config),
}


class Calls(TorchDispatchMode):
    """Counts the calls of our ops."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "flashcore":
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


def decode(model: Any, batch: dict[str, Tensor], make_cache: Callable[..., Any], num_steps: int = 3) -> Tensor:
    """Logits of some steps after a prefill; the tokens fed in are fixed."""
    cache, mask = make_cache(model, len(batch["input_ids"])), batch["attention_mask"]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    model(**batch, position_ids=positions, past_key_values=cache)
    logits = []
    for step in range(num_steps):
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        inputs = {"input_ids": batch["input_ids"][:, -1 - step, None], "attention_mask": mask}
        logits.append(model(**inputs, position_ids=positions[:, -1:] + step + 1, past_key_values=cache).logits)
    return torch.cat(logits, dim=1)


def as_parents(model: Any) -> Any:
    """The same patched model with its layers unfused."""
    parents = copy.deepcopy(model)
    unfuse_modules(parents)
    return parents


@pytest.mark.parametrize("kind", ["single", "left-padded"])
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("family", FUSED_FAMILIES)
def test_steps_are_the_parents_bit_by_bit(family: str, cache: str, kind: str) -> None:
    model, batch = patch(make_model(family)), make_batch(kind)
    expected = decode(as_parents(model), batch, CACHES[cache])
    with Calls() as calls:
        actual = decode(model, batch, CACHES[cache])
    assert torch.equal(actual, expected)
    assert calls.names.count("rope_append_attention") == (3 * 2 if cache == "static" else 0)
    has_bias = family.startswith("qwen2")
    assert calls.names.count("linear") == 3 * (2 * (3 if has_bias else 4) + 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_rounds_once_a_module_as_the_parents_do(dtype: torch.dtype) -> None:
    """The rotation alone is rounded once less; with a dynamic cache it is the parent's own."""
    model, batch = patch(make_model(dtype=dtype)), make_batch("left-padded")
    assert torch.equal(decode(model, batch, CACHES["dynamic"]), decode(as_parents(model), batch, CACHES["dynamic"]))


class Scaled(nn.Module):
    """Stands in for an adapter: a linear layer and something on top of it."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.weight, self.bias = base.weight, None

    def forward(self, hidden: Tensor) -> Tensor:
        return 1.5 * self.base(hidden)


class OtherMLP(nn.Module):
    """Has the names of the standard one and another meaning."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj, self.act_fn = (
            mlp.gate_proj,
            mlp.up_proj,
            mlp.down_proj,
            mlp.act_fn,
        )

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.up_proj(hidden)) * self.gate_proj(hidden))


class OtherAttention(nn.Module):
    """Wraps the standard one."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.inner = attention
        self.config = attention.config

    def forward(self, **arguments: Any) -> Any:
        output, weights = self.inner(**arguments)
        return 2 * output, weights


def _wrap(owner: str, name: str) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        for layer in model.model.layers:
            module = layer.get_submodule(owner)
            setattr(module, name, Scaled(getattr(module, name)))

    return change


def _replace(name: str, kind: Any) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        for layer in model.model.layers:
            setattr(layer, name, kind(getattr(layer, name)))

    return change


def _hook(path: str, is_pre: bool = False) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        for layer in model.model.layers:
            module = layer.get_submodule(path)
            if is_pre:
                module.register_forward_pre_hook(lambda module, args: (1.5 * args[0], *args[1:]))
            else:
                module.register_forward_hook(lambda module, args, output: _scale(output))

    return change


def _scale(output: Any) -> Any:
    return (1.5 * output[0], *output[1:]) if isinstance(output, tuple) else 1.5 * output


def _own_forward(path: str) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        for layer in model.model.layers:
            module = layer.get_submodule(path)
            original = module.forward
            module.forward = lambda *args, original=original, **kwargs: _scale(original(*args, **kwargs))

    return change


def _bias(path: str) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        for layer in model.model.layers:
            linear = layer.get_submodule(path)
            linear.bias = nn.Parameter(torch.linspace(-1, 1, linear.out_features))

    return change


def _activation(model: Any) -> None:
    for layer in model.model.layers:
        layer.mlp.act_fn = nn.GELU()


CHANGES: dict[str, Callable[[Any], None]] = {
    "adapter on q": _wrap("self_attn", "q_proj"),
    "adapter on o": _wrap("self_attn", "o_proj"),
    "adapter on up": _wrap("mlp", "up_proj"),
    "adapter on down": _wrap("mlp", "down_proj"),
    "another MLP": _replace("mlp", OtherMLP),
    "another norm": _replace("input_layernorm", Scaled),
    "another attention": _replace("self_attn", OtherAttention),
    "hook on v": _hook("self_attn.v_proj"),
    "pre-hook on k": _hook("self_attn.k_proj", is_pre=True),
    "hook on attention": _hook("self_attn"),
    "hook on a norm": _hook("post_attention_layernorm"),
    "hook on the MLP": _hook("mlp"),
    "pre-hook on the MLP": _hook("mlp", is_pre=True),
    "hook on the activation": _hook("mlp.act_fn"),
    "hook on down": _hook("mlp.down_proj"),
    "own forward of o": _own_forward("self_attn.o_proj"),
    "own forward of the MLP": _own_forward("mlp"),
    "own forward of a norm": _own_forward("input_layernorm"),
    "bias on o": _bias("self_attn.o_proj"),
    "bias on gate": _bias("mlp.gate_proj"),
    "GELU": _activation,
    "hook on the head": lambda model: model.lm_head.register_forward_hook(lambda module, args, output: 1.5 * output),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_someone_put_into_the_model_is_obeyed(change: str) -> None:
    """Bit by bit as without fusion, and otherwise than without the change."""
    model, batch = patch(make_model()), make_batch("left-padded")
    usual = decode(model, batch, CACHES["static"])
    CHANGES[change](model)
    parents = as_parents(model)
    if change.startswith(("hook", "pre-hook", "own")):
        # What deepcopy carries over is bound to the original.
        parents = patch(make_model())
        unfuse_modules(parents)
        CHANGES[change](parents)
    actual = decode(model, batch, CACHES["static"])
    assert torch.equal(actual, decode(parents, batch, CACHES["static"]))
    assert not torch.equal(actual, usual)


def test_batches_of_more_rows_than_a_step_takes_go_the_parents_way() -> None:
    model, ids = patch(make_model()), torch.randint(2, VOCABULARY, (33, PROMPT_LEN))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    expected = decode(as_parents(model), batch, CACHES["static"])
    with Calls() as calls:
        actual = decode(model, batch, CACHES["static"])
    assert torch.equal(actual, expected)
    assert {"linear", "rope_append_attention"}.isdisjoint(calls.names)


def test_autocast_reaches_the_linear_layers() -> None:
    model, batch = patch(make_model()), make_batch("left-padded")
    parents = as_parents(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, actual = (decode(each, batch, CACHES["dynamic"]) for each in (parents, model))
    assert actual.dtype == torch.bfloat16
    assert torch.equal(actual, expected)


def test_the_layers_go_on_after_hidden_states_were_recorded() -> None:
    """transformers leaves its recording hooks in the model; they may not switch fusion off."""
    model, batch = patch(make_model()), make_batch("left-padded")
    expected = decode(model, batch, CACHES["static"])
    states = model(**batch, output_hidden_states=True).hidden_states
    assert len(states) == 3
    with Calls() as calls:
        assert torch.equal(decode(model, batch, CACHES["static"]), expected)
    assert calls.names.count("rope_append_attention") == 6
    assert is_capturable(model)


@pytest.mark.parametrize("cache", CACHES)
def test_hidden_states_of_a_step_are_those_of_the_parents(cache: str) -> None:
    model, batch = patch(make_model()), make_batch("left-padded")
    states = []
    for each in (model, as_parents(model)):
        past = CACHES[cache](each, 3)
        each(**batch, past_key_values=past)
        step = each(batch["input_ids"][:, :1], past_key_values=past, output_hidden_states=True)
        states.append(torch.stack(step.hidden_states))
    assert torch.equal(*states)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_another_implementation_set_later_is_obeyed(implementation: str) -> None:
    model, plain, batch = patch(make_model()), make_model(), make_batch("left-padded")
    for each in (model, plain):
        each.set_attn_implementation(implementation)
    with Calls() as calls:
        actual = decode(model, batch, CACHES["dynamic"])
    torch.testing.assert_close(actual, decode(plain, batch, CACHES["dynamic"]))
    assert set(calls.names) <= {"linear"}
    with torch.enable_grad():
        logits = model(batch["input_ids"][:, :1]).logits
        logits.sum().backward()
    assert model.lm_head.weight.grad is not None


@pytest.mark.parametrize("cache", CACHES)
def test_gradients_are_refused_before_anything_is_written(cache: str) -> None:
    model, batch = patch(make_model()), make_batch()
    past = CACHES[cache](model, 1)
    model(**batch, past_key_values=past)
    with torch.enable_grad(), pytest.raises(GradientError, match=r"torch\.no_grad\(\)"):
        model(batch["input_ids"][:, :1], past_key_values=past)
    if cache == "static":
        assert not past.layers[0].keys[:, :, PROMPT_LEN:].any()


def test_options_that_a_prefill_refuses_are_refused_in_a_step_too() -> None:
    model, batch = patch(make_model()), make_batch()
    past = make_static_cache(model, 1, 24)
    model(**batch, past_key_values=past)
    with pytest.raises(OptionError, match="output_attentions"):
        model(batch["input_ids"][:, :1], past_key_values=past, output_attentions=True)
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    with pytest.raises(OptionError, match="attention_dropout"):
        model.train()(batch["input_ids"][:, :1], past_key_values=past)


@pytest.mark.parametrize("family", FUSED_FAMILIES)
def test_restore_gives_back_the_very_classes(family: str) -> None:
    model = make_model(family)
    classes = [type(module) for module in model.modules()]
    state = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    patch(model)
    assert isinstance(model, KeptGeneration)
    assert sum(isinstance(module, FlashCoreDecoderLayer) for module in model.modules()) == 2
    assert type(model.lm_head) is FlashCoreLinear
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == state
    assert type(model).__name__ == classes[0].__name__
    restore_attention(model)
    assert [type(module) for module in model.modules()] == classes


@pytest.mark.parametrize("family", ["llama", "qwen2-window"])
def test_copies_and_pickles_decode_alike_and_restore(family: str) -> None:
    model, batch = patch(make_model(family)), make_batch("left-padded")
    expected, parent = decode(model, batch, CACHES["static"]), type(make_model(family))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False))
    for each in copies:
        assert type(each) is type(model)
        assert torch.equal(decode(each, batch, CACHES["static"]), expected)
        assert type(restore_attention(each)) is parent
    assert isinstance(model, KeptGeneration)


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_a_pickle_is_served_in_a_process_that_patched_nothing(family: str, tmp_path: Path) -> None:
    # Phi-3's layers are not fused, and without a head nothing of it is ours but what stands before its layers.
    torch.save(patch(make_model(family)).base_model, tmp_path / "model.pt")
    code = f"""
import torch
model = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)
with torch.no_grad():
    print(model(torch.tensor([[1, 2, 3]]))[0].shape)
"""
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "torch.Size([1, 3, 64])" in finished.stdout, finished.stderr[-2000:]


def test_steps_with_frequencies_chosen_on_the_host_are_not_captured() -> None:
    sizes: dict[str, Any] = {"vocab_size": 32, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4}
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    assert is_capturable(patch(LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=1)).eval()))
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=1, rope_parameters=rope)).eval()
    assert not is_capturable(patch(model))


class Doubled(torch.Tensor):
    """A weight that brings its own matrix product, as quantized and sharded ones do."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.linear:
            return 2 * nn.functional.linear(args[0], args[1].as_subclass(Tensor))
        return super().__torch_function__(func, types, args, kwargs or {})


def test_weights_with_a_product_of_their_own_keep_it() -> None:
    model, ids = make_model(), torch.tensor([[7]])
    down = model.model.layers[0].mlp.down_proj
    down.weight = nn.Parameter(down.weight.data.as_subclass(Doubled), requires_grad=False)
    with torch.no_grad():
        expected = model(ids).logits
        patch(model)
        assert torch.equal(model(ids).logits, expected)
    assert not is_capturable(model)


def test_a_slice_of_embeddings_is_decoded() -> None:
    model = make_model()
    embeddings = torch.randn(2, 5, model.config.hidden_size)
    with torch.no_grad():
        expected = model(inputs_embeds=embeddings[:, 2:3]).logits
        assert torch.equal(patch(model)(inputs_embeds=embeddings[:, 2:3]).logits, expected)


def test_compiled_modules_and_global_hooks_are_no_captures() -> None:
    model = patch(make_model())
    assert is_capturable(model)
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert not is_capturable(model)
    handle.remove()
    model.model.layers[0].compile(backend="eager")
    assert not is_capturable(model)
