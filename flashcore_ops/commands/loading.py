"""From the words of a command line to a device, a dtype and a loaded model."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    StrictDataclassError,
)
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from flashcore_ops.errors import DeviceError, DtypeError, OptionError, first_line
from flashcore_ops.hub import is_hub_id
from flashcore_ops.integrations.families import reference_implementation
from flashcore_ops.integrations.model_checks import check_model
from flashcore_ops.model_shapes import SHAPES, shape_config

# What is raised on purpose, and what a config's wrong values raise wherever transformers comes to compute with them.
_LOAD_ERRORS = (ImportError, OSError, RuntimeError, ValueError, SafetensorError, StrictDataclassError)
_ERRORS_OF_WRONG_VALUES = (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_device(name: str) -> torch.device:
    """The torch device that `name` (auto, cpu, cuda or cuda:N) stands for.

    Raises:
        DeviceError: for any other name, and for a GPU that torch does not see.

    Example:
        >>> resolve_device("cpu")
        device(type='cpu')
    """
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise DeviceError.explain(
            "--device", expected="auto, cpu, cuda or cuda:N", got=repr(name), fix="Use one of these."
        )
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda" if num_gpus else "cpu")
    if name == "cpu":
        return torch.device("cpu")
    index = int(name.partition(":")[2] or 0)
    if not num_gpus:
        raise DeviceError.explain(
            f"--device {name}", expected="a GPU", got="none that torch can see", fix="Use --device cpu."
        )
    if index >= num_gpus:
        raise DeviceError.explain(
            f"--device {name}",
            expected=f"an index below {num_gpus}",
            got=str(index),
            fix="`flashcore info` lists the GPUs.",
        )
    return torch.device("cuda", index)


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype that `name` (auto or a name in DTYPES) stands for on `device`.

    Raises:
        DtypeError: for any other name.

    Example:
        >>> resolve_dtype("auto", torch.device("cpu"))
        torch.float32
    """
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if name not in DTYPES:
        raise DtypeError.explain(
            "--dtype", expected=f"auto, {', '.join(DTYPES)}", got=repr(name), fix="Use one of these."
        )
    return DTYPES[name]


def check_model_name(name: str) -> None:
    """Refuses what can be neither a model directory nor a hub id, before anything is loaded.

    Raises:
        OptionError: for a missing path, a file, or a directory without config.json.
    """
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise OptionError.explain(
                "MODEL",
                expected="a directory with a config.json",
                got=f"{name}, which has none",
                fix="Pass a directory that save_pretrained wrote.",
            )
    elif path.exists() or not is_hub_id(name):
        raise OptionError.explain(
            "MODEL",
            expected="an existing model directory or a hub id such as owner/name",
            got=repr(name),
            fix="Check the path.",
        )


def load_model(
    name: str, *, dtype: torch.dtype, device: torch.device
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a causal language model with Hugging Face's attention that it is held against, and its tokenizer.

    Raises:
        OptionError: if there is no such model or transformers cannot load it.
        UnsupportedModelError: if FlashCore cannot serve it, found out before its weights are fetched.
    """
    with load_errors(name, expected="a causal language model that transformers can load"):
        options: dict[str, Any] = {"local_files_only": is_local(name), "trust_remote_code": False}
        config = AutoConfig.from_pretrained(name, **options)
        outline = make_outline(config, dtype)
    check_model(outline)
    with load_errors(name, expected="a tokenizer that transformers can load"):
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
    reference = reference_implementation(type(outline))
    with load_errors(name, expected="weights that transformers can load"):
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, attn_implementation=reference, **options)
    return model.to(device).eval(), tokenizer


def load_config(name: str) -> PreTrainedConfig:
    """The config of a model: a named shape's, a directory's, a config.json's, or a hub model's. No weights are fetched.

    Raises:
        OptionError: if there is no such model or transformers cannot read its config.
    """
    if name in SHAPES:
        return shape_config(name)
    path = Path(name)
    if not name or (not path.exists() and "/" not in name):
        # A hub id of one word is most likely a shape's name mistyped, which the hub would not tell.
        raise OptionError.explain(
            "MODEL_OR_CONFIG",
            expected=f"a model directory, a config.json, a hub id such as owner/name, or one of {', '.join(SHAPES)}",
            got=repr(name),
            fix="Check the name or the path.",
        )
    if not path.is_file():
        check_model_name(name)
    with load_errors(name, expected="a config that transformers can load"):
        return AutoConfig.from_pretrained(name, local_files_only=is_local(name), trust_remote_code=False)


def load_generation_config(name: str) -> GenerationConfig | None:
    """The generation settings that come with what `load_config` loaded, where from_pretrained finds them.

    None for a named shape, which has none.
    """
    if name in SHAPES:
        return None
    path = Path(name)
    if path.is_file():
        return GenerationConfig.from_pretrained(path.parent, path.name, _from_model_config=True)
    local_only = is_local(name)
    # A damaged file counts as a missing one. What older models have of them stands in config.json.
    with suppress(OSError):
        return GenerationConfig.from_pretrained(name, local_files_only=local_only)
    return GenerationConfig.from_pretrained(name, "config.json", local_files_only=local_only, _from_model_config=True)


def make_outline(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a config, in evaluation mode and on the meta device: modules without weights.

    With a language model's head, where transformers has one for it.

    Example:
        >>> outline = make_outline(load_config("llama-3.1-8b"), torch.bfloat16)
        >>> type(outline).__name__, outline.device.type
        ('LlamaForCausalLM', 'meta')
    """
    # In this order, since of some encoder-decoder models there is the decoder alone too.
    heads = (
        (MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING, AutoModelForSeq2SeqLM),
        (MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM),
    )
    auto: Any = next((auto for mapping, auto in heads if type(config) in mapping), AutoModel)
    with torch.device("meta"):
        model: PreTrainedModel = auto.from_config(config, dtype=dtype)
    return model.eval()


def is_local(name: str) -> bool:
    """Whether a model is to be read from this machine alone: a path, or a hub id while the hub cannot be asked."""
    return Path(name).exists() or not hub_answers(name)


def hub_answers(hub_id: str) -> bool:
    """Whether the hub can be asked for this model now.

    Without a connection from_pretrained retries for most of a minute; a cached model needs none of it.

    Raises:
        HfHubHTTPError: if it answers that there is no such model, or refuses.
    """
    try:
        HfApi().model_info(hub_id, timeout=10)
    except (httpx.TransportError, OfflineModeIsEnabled):
        return False
    return True


@contextmanager
def load_errors(name: str, *, expected: str) -> Iterator[None]:
    """Turns what transformers, the hub client and safetensors raise into one plain sentence.

    `name` is a model directory or a hub id; `expected` says what is being loaded from it. The
    original error stays as the cause.
    """
    try:
        yield
    except (*_LOAD_ERRORS, *_ERRORS_OF_WRONG_VALUES) as error:
        known = known_hub_problem(error)
        got = f"{type(error).__name__} ({first_line(error)})"
        expected, got, fix = known or (expected, got, "Check the model's files.")
        raise OptionError.explain(f"MODEL {name}", expected=expected, got=got, fix=fix) from error


def known_hub_problem(error: BaseException) -> tuple[str, str, str] | None:
    """What was expected, what came, and what to do, if the hub is among the error's causes."""
    causes = list(cause_chain(error))

    def caused_by(*classes: type[BaseException]) -> bool:
        return any(isinstance(cause, classes) for cause in causes)

    if caused_by(GatedRepoError):
        return (
            "a model that you may read",
            "a gated one",
            "Accept its terms on its hub page, then run `hf auth login`.",
        )
    if caused_by(RepositoryNotFoundError):
        return (
            "a model directory or a model on the hub",
            "neither",
            "Check the name; for a private model run `hf auth login` first.",
        )
    if caused_by(LocalEntryNotFoundError, OfflineModeIsEnabled, httpx.TransportError):
        return (
            "a model directory, or a connection to the hub",
            "neither",
            "Check the path or the connection, or pass a local directory.",
        )
    for cause in causes:
        if isinstance(cause, HfHubHTTPError):
            status = cause.response.status_code
            fix = "Run `hf auth login` again." if status == 401 else "Try again later, or pass a local directory."
            return ("an answer from the hub", f"HTTP status {status}", fix)
    return None


def cause_chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error, and what it was raised from, outermost first."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
