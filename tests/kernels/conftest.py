"""The kernels' own tests run where kernels run: on a GPU, or in Triton's interpreter.

Without a GPU they are not collected unless TRITON_INTERPRET=1; `test_interpreter.py` runs them so, in a process of
their own, since the interpreter must be chosen before triton is first imported.
"""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.problems import DTYPES

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# tests/test_attention.py takes a GPU through every dtype; here its time goes to tile edges.
KERNEL_DTYPES = DTYPES if IS_INTERPRETED else [torch.bfloat16]
# On a GPU the ops' own tests take the same kernels through these.
LEFT_TO_THE_OPS = {"test_options", "test_head_dims", "test_norm"}
LAUNCHING = [
    "test_argmax.py",
    "test_decode.py",
    "test_kv_append.py",
    "test_linear.py",
    "test_prefill.py",
    "test_rope_decode.py",
    "test_softmax.py",
    "test_step_input.py",
]

# Gluon, which the interpreter does not run.
LAUNCHING_ON_HOPPER = ["test_decode_hopper.py", "test_prefill_hopper.py", "test_rope_decode_hopper.py"]

if IS_INTERPRETED:
    collect_ignore = ["test_ahead_of_time.py", "test_interpreter.py", "test_launch.py", *LAUNCHING_ON_HOPPER]
elif torch.cuda.is_available():
    collect_ignore = ["test_interpreter.py"]
else:
    collect_ignore = LAUNCHING + LAUNCHING_ON_HOPPER


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent != Path(__file__).parent or item.path.name not in LAUNCHING + LAUNCHING_ON_HOPPER:
            continue
        if IS_INTERPRETED:
            # Its bfloat16 is float32 with truncated casts.
            if torch.bfloat16 in getattr(item, "callspec", SimpleNamespace(params={})).params.values():
                item.add_marker(pytest.mark.slow)
            continue
        item.add_marker(pytest.mark.gpu)
        if not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="kernels run on a GPU, or with TRITON_INTERPRET=1"))
        elif item.path.name in LAUNCHING_ON_HOPPER and torch.cuda.get_device_capability() != (9, 0):
            item.add_marker(pytest.mark.skip(reason="needs a Hopper GPU"))
        if item.path.name in LAUNCHING and getattr(item, "originalname", "") in LEFT_TO_THE_OPS:
            item.add_marker(pytest.mark.slow)


@pytest.fixture
def kernel_device() -> str:
    return "cpu" if IS_INTERPRETED else "cuda"
