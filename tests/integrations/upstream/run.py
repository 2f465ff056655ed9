"""Runs transformers' own tests of its sdpa attention against eager, with FlashCore's attention in sdpa's place.

Usage: python -m tests.integrations.upstream.run TEST_MODELING_COMMON RESULTS FAMILY ...

In a process of its own, since the name "sdpa" is every model's. TEST_MODELING_COMMON is that file of transformers'
source distribution; it tests what a `model_tester` makes, here the tiny models. RESULTS is written as JSON, a `Run`
each. The tests run with Hugging Face's attention, with FlashCore's, and one with FlashCore's broken on purpose.
"""

from __future__ import annotations

import json
import sys
import unittest
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.models.auto import modeling_auto

from flashcore_ops.integrations.attention import fcore_attention
from flashcore_ops.integrations.families import Feature
from flashcore_ops.integrations.masks import create_fcore_mask
from tests.integrations.models import ARGUMENTS, VOCABULARY, features_of, make_config

FAMILIES = ("llama", "mistral", "qwen2", "gemma2", "gpt-neox", "gpt-oss")
STOCK, OURS = "sdpa", "fcore"
# The heads that transformers tests each of these families with.
_MAPPINGS = (
    modeling_auto.MODEL_MAPPING,
    modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING,
    modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
)
_ALL = "*.test_eager_matches_sdpa_inference*"
_ONE = "*.test_eager_matches_sdpa_inference_*_fp32_pad_left"

Attention = Callable[..., tuple[Tensor, None]]


class Run(NamedTuple):
    """One test of one family.

    Attributes:
        family: a name of `models.py`.
        attention: what stood in sdpa's place: STOCK, OURS, or what `broken` calls it.
        test: the test's name.
        outcome: "passed", "failed" or "skipped".
        reason: why it failed or was skipped.
        num_calls: how often a layer called FlashCore's attention.
        num_op_calls: how often that called `torch.ops.flashcore.attention`.
    """

    family: str
    attention: str
    test: str
    outcome: str
    reason: str
    num_calls: int
    num_op_calls: int


def broken(argument: str) -> str:
    """The name of FlashCore's attention with one of its arguments lost."""
    return f"{OURS} without {argument}"


def arguments_of(family: str) -> list[str]:
    """The arguments of attention that the family's output depends on."""
    features = [Feature.SCALE, *features_of(family)]
    return sorted({ARGUMENTS[feature] for feature in features if feature in ARGUMENTS})


class TinyModel:
    """What the tests call a model_tester: it makes a config and inputs."""

    def __init__(self, family: str) -> None:
        self.family = family

    def prepare_config_and_inputs_for_common(self) -> tuple[PreTrainedConfig, dict[str, Tensor]]:
        # With weights as wide as elsewhere, Hugging Face's own sdpa misses the tests' tolerances.
        config = make_config(self.family, initializer_range=0.1)
        return config, {"input_ids": torch.randint(2, VOCABULARY, (7, 11))}


class Recorder(unittest.TestResult):
    """Keeps a `Run` of every test."""

    def __init__(self, family: str, attention: str, calls: mock.Mock, op_calls: mock.Mock) -> None:
        super().__init__()
        self.family, self.attention = family, attention
        self.calls, self.op_calls = calls, op_calls
        self.runs: list[Run] = []

    def startTest(self, test: unittest.TestCase) -> None:
        super().startTest(test)
        self.calls.reset_mock()
        self.op_calls.reset_mock()

    def addSuccess(self, test: unittest.TestCase) -> None:
        self._add(test, "passed")

    def addSkip(self, test: unittest.TestCase, reason: str) -> None:
        self._add(test, "skipped", reason)

    def addFailure(self, test: unittest.TestCase, err: Any) -> None:
        self._add(test, "failed", f"{err[0].__name__}: {err[1]}")

    addError = addFailure

    def _add(self, test: unittest.TestCase, outcome: str, reason: str = "") -> None:
        name = test.id().rpartition(".")[2]
        counts = (self.calls.call_count, self.op_calls.call_count)
        self.runs.append(Run(self.family, self.attention, name, outcome, reason, *counts))


def load(file: Path) -> ModuleType:
    """The distribution's module, in a package of its own that has the two modules that the distribution lacks."""
    package = ModuleType("transformers_tests")
    package.__path__ = [str(file.parent)]
    sys.modules[package.__name__] = package
    for module, mixin in (
        ("exporters.test_export", "ExportTesterMixin"),
        ("generation.test_utils", "GenerationTesterMixin"),
    ):
        stub = ModuleType(f"{package.__name__}.{module}")
        setattr(stub, mixin, type(mixin, (), {}))
        sys.modules[stub.__name__] = stub
    return import_module(f"{package.__name__}.{file.stem}")


def make_case(mixin: type, family: str) -> type[Any]:
    """transformers' tests of the family's tiny model."""
    config_class = type(make_config(family))
    members = {
        "model_tester": TinyModel(family),
        "all_model_classes": tuple(mapping[config_class] for mapping in _MAPPINGS),
    }
    return type(family, (mixin, unittest.TestCase), members)


@contextmanager
def in_place_of_sdpa(attention: Attention, model_classes: tuple[type, ...]) -> Iterator[None]:
    """Gives an attention function and FlashCore's masks the name "sdpa"."""
    with ExitStack() as stack:
        for interface, function in ((AttentionInterface, attention), (AttentionMaskInterface, create_fcore_mask)):
            stack.enter_context(mock.patch.dict(interface._global_mapping, {"sdpa": function}))
        for model_class in model_classes:
            # GPT-OSS refuses sdpa, which knows no sinks. FlashCore's attention does.
            stack.enter_context(mock.patch.object(model_class, "_supports_sdpa", True))
        yield


def run(case: type[Any], attention: str, pattern: str, change: dict[str, Any] | None = None) -> list[Run]:
    """Runs the tests whose name has the pattern; `change` replaces arguments of FlashCore's attention."""
    calls = mock.Mock(side_effect=lambda *args, **kwargs: fcore_attention(*args, **(kwargs | (change or {}))))
    with ExitStack() as stack:
        if attention != STOCK:
            stack.enter_context(in_place_of_sdpa(calls, case.all_model_classes))
        op = torch.ops.flashcore.attention
        op_calls = stack.enter_context(mock.patch.object(torch.ops.flashcore, "attention", wraps=op))
        loader = unittest.TestLoader()
        loader.testNamePatterns = [pattern]
        recorder = Recorder(case.__name__, attention, calls, op_calls)
        loader.loadTestsFromTestCase(case).run(recorder)
    return recorder.runs


def main(file: str, results: str, *families: str) -> None:
    mixin = load(Path(file)).ModelTesterMixin
    runs = []
    for family in families:
        case = make_case(mixin, family)
        runs += run(case, STOCK, _ALL) + run(case, OURS, _ALL)
        for argument in arguments_of(family):
            # Without a scale of its own, a layer's is the default of None, so that one is lost by scores of 0.
            lost = {argument: 0.0 if argument == ARGUMENTS[Feature.SCALE] else None}
            runs += run(case, broken(argument), _ONE, lost)
    Path(results).write_text(json.dumps([entry._asdict() for entry in runs]))


if __name__ == "__main__":
    main(*sys.argv[1:])
