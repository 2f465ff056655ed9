"""The files that a deployment copies: the project's own, and nothing that may be secret."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from dataclasses import dataclass
from fnmatch import fnmatch
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from flashcore_ops.errors import DeploymentError

ROOT = Path(__file__).resolve().parents[2]
DISTRIBUTION = "flashcore"
# Where a wheel keeps what an install from source needs besides the packages (pyproject.toml's data-files).
SHARED = ("share", DISTRIBUTION)
PACKAGES = ("csrc_free_kernels", "flashcore_ops")
# What an install from source and the validation need, for sources without git.
SOURCES = (
    "LICENSE",
    "README.md",
    "constraints/*.txt",
    "pyproject.toml",
    "scripts/setup_env.py",
    *(f"{package}/**/*" for package in PACKAGES),
)
# Never copied, even where git knows them.
SECRET_FILES = (
    *(".env", ".env.*", "*.env", "*.key", "*.p12", "*.pem", "*.pfx"),
    *("id_rsa*", "id_dsa*", "id_ecdsa*", "id_ed25519*", "kubeconfig"),
    *(".netrc", "_netrc", ".pypirc", ".git-credentials", "credentials", "credentials.json"),
    *("token", "stored_tokens", "*.token"),
)


@dataclass(frozen=True)
class Project:
    """A directory with exactly the files to copy, their number and a digest of their names, modes and contents."""

    directory: Path
    num_files: int
    digest: str
    left_out: tuple[str, ...] = ()


def stage_project(target: Path) -> Project:
    """Copies the project's files into the new directory `target`.

    They are those that git tracks in a checkout; without git, the packages and what installs them, from the
    source directory or from the installed distribution. Files that look like secrets are left out.

    Raises:
        DeploymentError: there is neither a source directory nor an installed distribution with its sources.
    """
    target.mkdir(parents=True)
    digest = hashlib.sha256()
    sources = project_files()
    kept = sorted(name for name in sources if not is_secret(name))
    for name in kept:
        source, copy = sources[name], target / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, copy, follow_symlinks=False)
        content = os.readlink(copy).encode() if copy.is_symlink() else copy.read_bytes()
        mode = copy.lstat().st_mode
        digest.update(f"{name}\0{mode:o}\0{len(content)}\0".encode(errors="surrogateescape"))
        digest.update(content)
    left_out = tuple(sorted(sources.keys() - set(kept)))
    return Project(target, num_files=len(kept), digest=digest.hexdigest(), left_out=left_out)


def is_secret(name: str) -> bool:
    """Whether a file's name is one that keys, tokens and passwords are kept under.

    Example:
        >>> [is_secret(name) for name in ("a/.env", "deploy.pem", "id_ed25519", "tests/tokens.py")]
        [True, True, True, False]
    """
    return any(fnmatch(Path(name).name.lower(), pattern) for pattern in SECRET_FILES)


def project_files() -> dict[str, Path]:
    """Where each file of the project is, by its path in the project."""
    files = tracked_files() if (ROOT / ".git").exists() and shutil.which("git") else None
    if files is None and (ROOT / "pyproject.toml").is_file():
        files = {path.relative_to(ROOT).as_posix(): path for pattern in SOURCES for path in ROOT.glob(pattern)}
    if files is None:
        files = installed_files()
    return {
        name: path
        for name, path in files.items()
        if (path.is_file() or path.is_symlink()) and "__pycache__" not in path.parts
    }


def tracked_files() -> dict[str, Path] | None:
    """The files that git tracks; None where git cannot read the checkout."""
    command = ("git", "-C", str(ROOT), "ls-files", "-z")
    listed = subprocess.run(command, capture_output=True, check=False)
    if listed.returncode != 0:
        return None
    names = [os.fsdecode(name) for name in listed.stdout.split(b"\0") if name]
    return {name: ROOT / name for name in names}


def installed_files() -> dict[str, Path]:
    """The files of the installed distribution, at the places that they have in the source directory."""
    try:
        recorded = distribution(DISTRIBUTION).files or []
    except PackageNotFoundError:
        recorded = []
    files = {}
    for path in recorded:
        parts = tuple(part for part in path.parts if part != "..")
        if parts[: len(SHARED)] == SHARED:
            files["/".join(parts[len(SHARED) :])] = Path(str(path.locate()))
        elif parts[0] in PACKAGES:
            files["/".join(parts)] = Path(str(path.locate()))
    if "pyproject.toml" not in files:
        raise DeploymentError.explain(
            "project",
            expected=f"a source directory, or the installed distribution {DISTRIBUTION} with its sources",
            got=f"neither at {ROOT}",
            fix="Run the command from a clone of the repository, or install the package again.",
        )
    return files
