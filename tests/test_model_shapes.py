"""Named shapes are those of the published models, and random models are made in place and repeatably."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from flashcore_ops.errors import OptionError
from flashcore_ops.integrations.model_checks import check_model
from flashcore_ops.model_shapes import SHAPES, random_model, shape_config

# As the model's hub page counts the tensors of its safetensors files.
PUBLISHED_PARAMETERS = {
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "mistral-7b-v0.3": 7_248_023_552,
    "qwen2.5-7b": 7_615_616_512,
}
CPU = torch.device("cpu")


def tiny_config() -> Any:
    config = shape_config("llama-3.2-1b", num_layers=2)
    config.update({"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "head_dim": 16})
    config.update({"num_attention_heads": 4, "num_key_value_heads": 2})
    return config


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_has_the_published_number_of_parameters_and_can_be_patched(name: str) -> None:
    model = random_model(shape_config(name), torch.bfloat16, torch.device("meta"))
    assert model.num_parameters() == PUBLISHED_PARAMETERS[name]
    check_model(model)


@pytest.mark.parametrize("name", SHAPES)
def test_each_config_is_new_and_can_keep_fewer_layers(name: str) -> None:
    changed = shape_config(name, num_layers=1)
    changed.rope_parameters["rope_theta"] = 1.0
    whole = shape_config(name)
    assert changed.num_hidden_layers == 1
    assert whole.num_hidden_layers > 1
    assert whole.rope_parameters["rope_theta"] > 1.0
    assert len(getattr(changed, "layer_types", None) or [0]) == 1


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(OptionError, match=r"expected llama-3\.2-1b, .*qwen2\.5-7b, got 'llama-3'"):
        shape_config("llama-3")


@pytest.mark.parametrize("num_layers", [0, -1])
def test_a_model_without_layers_is_refused(num_layers: int) -> None:
    with pytest.raises(OptionError, match=f"num_layers: expected 1 or more, got {num_layers}"):
        shape_config("llama-3.2-1b", num_layers=num_layers)


class LargeResults(TorchDispatchMode):
    """The dtypes of the tensors of so many elements and more that come out of ops."""

    def __init__(self, large: int) -> None:
        super().__init__()
        self.large = large
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.numel() >= self.large:
            self.dtypes.add(result.dtype)
        return result


def test_weights_are_drawn_in_their_own_dtype() -> None:
    with LargeResults(large=64 * 64) as seen:
        model = random_model(tiny_config(), torch.bfloat16, CPU)
    assert seen.dtypes == {torch.bfloat16}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not model.training
    assert model.config._attn_implementation == "sdpa"


def test_the_seed_decides_the_weights_and_the_callers_numbers_go_on() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    first, again, other = (random_model(tiny_config(), torch.float32, CPU, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.rand(4), expected)
    pairs = list(zip(first.parameters(), again.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(weight, same) for weight, same, _ in pairs)
    assert not torch.equal(pairs[0][0], pairs[0][2])


def test_names_are_known_without_transformers() -> None:
    script = (
        "import sys\nfrom flashcore_ops.model_shapes import SHAPES\nprint(len(SHAPES), 'transformers' in sys.modules)"
    )
    command = [sys.executable, "-c", script]
    root = Path(__file__).parents[1]
    finished = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert finished.stdout == f"{len(SHAPES)} False\n"
