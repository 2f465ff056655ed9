"""The README's code runs, and its two commands exist."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def code_blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_patch_runs(tmp_path: Path):
    pytest.importorskip("transformers")
    from flashcore_ops.integrations.transformers import is_patched
    from tests.integrations.models import PROMPT_LEN, make_batch, make_model

    make_model("llama").save_pretrained(tmp_path)
    (block,) = [block for block in code_blocks("python") if "replace_llama" in block]
    assert block.count('.to("cuda")') == block.count("\nmodel.generate(") == 1
    block = block.replace('.to("cuda")', '.to("cpu")').replace("\nmodel.generate(", "\ntokens = model.generate(")
    names: dict[str, Any] = {"path": tmp_path, "inputs": make_batch()}
    exec(block, names)
    assert is_patched(names["model"])
    assert names["tokens"].shape == (1, PROMPT_LEN + 100)


def test_the_op_by_itself_runs():
    (block,) = [block for block in code_blocks("python") if "append_kv_(" in block]
    names: dict[str, torch.Tensor] = {}
    exec(block, names)
    assert names["output"].shape == (1, 8, 1, 64)
    assert torch.equal(names["output"], names["same"])
    assert torch.equal(names["key_cache"][:, :, 37], names["key"][:, :, 0])


def test_the_commands_are_targets():
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^make (\S+)", "\n".join(code_blocks("bash")), flags=re.MULTILINE)
    assert targets == ["generate", "test"]
    for target in targets:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE)
