"""The README's code runs, and its two commands exist."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
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


def decode_block(name: str) -> str:
    """The code of the section on fast decoding that uses a name."""
    section = README.split("## Decode fast\n")[1].split("\n## ")[0]
    (block,) = [block for block in re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL) if name in block]
    return str(block)


def decode_names() -> dict[str, Any]:
    """What the blocks of that section take for granted, and the tokens that each must give."""
    pytest.importorskip("transformers")
    from flashcore_ops import replace_llama_attention_with_flashcore
    from tests.integrations.models import PROMPT_LEN, make_batch, make_model

    inputs = make_batch()
    expected = make_model().generate(**inputs, max_new_tokens=100, do_sample=False)[:, PROMPT_LEN:]
    tokenizer = SimpleNamespace(eos_token_id=-1, decode=lambda token: f"{int(token)} ")
    model = replace_llama_attention_with_flashcore(make_model())
    return {"model": model, "inputs": inputs, "tokenizer": tokenizer, "expected": expected}


def test_decoding_by_generate():
    names = decode_names()
    block = decode_block("free_kept_caches")
    assert block.count("\nmodel.generate(") == 1
    exec(block.replace("\nmodel.generate(", "\ntokens = model.generate("), names)
    assert torch.equal(names["tokens"][:, -100:], names["expected"])


def test_decoding_by_our_loop(capsys):
    names = decode_names()
    exec(decode_block("stream_tokens"), names)
    assert capsys.readouterr().out.split() == [str(token) for token in names["expected"][0].tolist()]
    assert names["tokens"].shape == (1, 100)


def test_decoding_by_torch_compile():
    names = decode_names()
    block = decode_block("make_static_cache")
    # CUDA graphs need a GPU; the graph that would be captured does not.
    assert block.count('mode="reduce-overhead"') == 1
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        exec(block.replace('mode="reduce-overhead"', 'backend="eager"'), names)
    assert torch.equal(torch.cat(names["tokens"], dim=1), names["expected"])


def test_the_ladder_and_the_number_of_kept_caches_are_those_of_the_code():
    pytest.importorskip("transformers")
    from flashcore_ops.kept_steps import MAX_KEPT, capacity_for

    rungs = [capacity_for(tokens) for tokens in (1, 257, 513)]
    assert f"A cache has {', '.join(map(str, rungs))}, ... slots" in README
    assert f"A model keeps at most {MAX_KEPT}," in README


def test_the_memory_example_gives_its_figures():
    pytest.importorskip("transformers")
    from typer.testing import CliRunner

    from flashcore_ops.cli import app

    section = README.split("## Memory\n")[1].split("\n## ")[0]
    (command,) = re.findall(r"```bash\nflashcore (.*)\n```", section)
    result = CliRunner().invoke(app, command.split(), env={"FORCE_COLOR": None, "COLUMNS": "80"})
    assert result.exit_code == 0, result.output
    rows = [line.split() for line in result.stdout.splitlines()]
    assert ["8", "2,048", "2.1", "GB", "8.6", "GB", "1.1", "GB", "4.3", "GB"] in rows
    assert "8 rows of 2048 tokens: 2.1 GB in bf16, and 8.6 GB as MHA" in section
    batches, lengths = (row for row in rows if row[:1] in (["2,048"], ["8"]) and len(row) == 5)
    assert f"the largest batch at 2048 tokens is {batches[1]}, the largest length at batch 8 is {lengths[1]}" in section


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


def test_the_same_attention_as_sdpa():
    (block,) = [block for block in code_blocks("python") if "scaled_dot_product_attention" in block]
    names: dict[str, Any] = {}
    exec(block, names)
    torch.testing.assert_close(names["after"], names["before"])
    torch.testing.assert_close(names["after_padded"], names["before_padded"])
