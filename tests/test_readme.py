"""The README's code runs, and its two commands exist."""

from __future__ import annotations

import re
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def code_blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


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
