"""transformers' tests of every model, out of its source distribution: the installed wheel has none."""

from __future__ import annotations

import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

from flashcore_ops.default_model import cache_directory

_TESTS = "tests/test_modeling_common.py"


class DistributionError(Exception):
    """The source distribution cannot be fetched, or lacks the tests."""


def modeling_tests() -> Path:
    """The file with them, of the installed version: fetched with pip on first use (10 MB), then kept in the cache.

    Raises:
        DistributionError: pip fails, as without a network, or the distribution lacks the file.
    """
    kept = cache_directory() / _name("-") / Path(_TESTS).name
    if kept.is_file():
        return kept
    kept.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=kept.parent) as scratch:
        partial = Path(scratch) / kept.name
        partial.write_bytes(_read(_download(Path(scratch))))
        # One rename at the end, so that another process finds the whole file or none.
        return partial.replace(kept)


def _name(separator: str) -> str:
    return f"transformers{separator}{version('transformers')}"


def _download(directory: Path) -> Path:
    options = ["--quiet", "--no-deps", "--no-binary=transformers", "--no-cache-dir", "--retries=2"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(directory), _name("==")]
    finished = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    archive = next(directory.glob("*.tar.gz"), None)
    if finished.returncode != 0 or archive is None:
        reason = (finished.stderr.strip().splitlines() or ["no archive"])[-1].removeprefix("ERROR: ")
        raise DistributionError(f"pip cannot download the source of {_name('==')}: {reason}")
    return archive


def _read(archive: Path) -> bytes:
    with tarfile.open(archive) as members:
        try:
            file = members.extractfile(f"{_name('-')}/{_TESTS}")
        except KeyError:
            file = None
        if file is None:
            raise DistributionError(f"{archive.name} has no {_TESTS}")
        return file.read()
