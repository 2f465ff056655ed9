"""Makes the virtual environment that the Makefile runs in, or leaves a current one alone.

Usage: python3 scripts/setup_env.py [VENV]

Needs nothing but the standard library, and parses on Python versions too old for FlashCore, to say so.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MINIMUM_PYTHON = (3, 11)
INDEX_VARIABLE = "TORCH_INDEX_URL"
# Stands in the environment from its first moment, so that one that another tool made is never deleted.
MARK = "flashcore-setup"
UNFINISHED = "unfinished"


class SetupError(Exception):
    """The set-up cannot go on; the message is one line that says what to do."""


def main(arguments: list[str]) -> int:
    venv = Path(arguments[0] if arguments else ".venv").absolute()
    try:
        check_python()
        if not is_current(venv):
            check_tools()
            build(venv)
    except SetupError as error:
        print(f"set-up: {error}", file=sys.stderr)
        return 1
    return 0


def check_python() -> None:
    if sys.version_info < MINIMUM_PYTHON:
        wanted = ".".join(map(str, MINIMUM_PYTHON))
        found = ".".join(map(str, sys.version_info[:3]))
        raise SetupError(
            f"needs Python {wanted} or newer, {sys.executable} is {found}. Install one and name it: "
            f"make PYTHON=python{wanted} ..."
        )


def check_tools() -> None:
    missing = missing_tools()
    if missing:
        tools = " and ".join(tool for tool, _ in missing)
        packages = " ".join(package for _, package in missing)
        raise SetupError(f"needs {tools}. On Debian or Ubuntu: apt-get install {packages}")


def missing_tools() -> list[tuple[str, str]]:
    """Returns what is not there, each with the Debian package that brings it."""
    missing = []
    try:
        import ensurepip  # noqa: F401
    except ImportError:
        missing.append(("Python's venv module with pip", "python3-venv"))
    # Triton compiles its launchers in C, torch.compile its CPU code in C++; both include Python.h.
    if sys.platform == "linux":
        if not has_compiler("CC", ["gcc", "clang"]):
            missing.append(("a C compiler", "gcc"))
        if not has_compiler("CXX", ["g++", "clang++"]):
            missing.append(("a C++ compiler", "g++"))
        if not Path(sysconfig.get_path("include"), "Python.h").is_file():
            missing.append(("Python's C headers", "python3-dev"))
    return missing


def has_compiler(variable: str, names: list[str]) -> bool:
    chosen = os.environ.get(variable)
    # A chosen compiler may carry a wrapper's arguments, as in CC="ccache gcc".
    return any(shutil.which(name) for name in (chosen.split()[:1] if chosen else names))


def has_nvidia_gpu() -> bool:
    if Path("/proc/driver/nvidia/version").exists():
        return True
    tool = shutil.which("nvidia-smi")
    return tool is not None and subprocess.run([tool, "-L"], capture_output=True).returncode == 0


def fingerprint(venv: Path) -> str:
    """Returns a digest of what the environment depends on: requirements, machine, Python, this file, its own path.

    The path counts because scripts and the editable install hold it: a moved checkout needs a new one. Of Python
    only the version counts, not where it lies: a set-up run by the environment's own interpreter finds it current.
    """
    import tomllib

    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    parts = [str(venv), str(has_nvidia_gpu()), str(sys.version_info[:2]), Path(__file__).read_text()]
    parts += [json.dumps(pyproject[table], sort_keys=True) for table in ("build-system", "project")]
    parts += [file.read_text() for file in sorted((ROOT / "constraints").glob("*.txt"))]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def is_current(venv: Path) -> bool:
    mark = venv / MARK
    return mark.is_file() and mark.read_text() == fingerprint(venv) and runs(venv_python(venv))


def runs(python: Path) -> bool:
    try:
        return subprocess.run([str(python), "-c", ""], capture_output=True).returncode == 0
    except OSError:
        return False


def build(venv: Path) -> None:
    """Makes the environment from nothing: an outdated or unfinished one is replaced, never repaired."""
    if venv.exists():
        if any(venv.iterdir()) and not (venv / MARK).is_file():
            raise SetupError(f"{venv} was made by something else. Move it away, or name another: make VENV=...")
        shutil.rmtree(venv)
    venv.mkdir(parents=True)
    (venv / MARK).write_text(UNFINISHED)
    print(f"set-up: making {venv}", flush=True)
    # The base interpreter, since this one may live in the very environment that was just replaced.
    run([getattr(sys, "_base_executable", sys.executable), "-m", "venv", str(venv)])
    install(venv_python(venv))
    (venv / MARK).write_text(fingerprint(venv))


def install(python: Path) -> None:
    """Installs torch first: what it asks for decides whether triton is pinned."""
    machine = "nvidia" if has_nvidia_gpu() else "cpu"
    constraints = ["--constraint", str(ROOT / "constraints" / f"{machine}.txt")]
    index = os.environ.get(INDEX_VARIABLE)
    print(f"set-up: installing torch (constraints/{machine}.txt)", flush=True)
    pip(python, *constraints, *(["--extra-index-url", index] if index else []), "torch")
    if not torch_asks_for_triton(python):
        constraints += ["--constraint", str(ROOT / "constraints" / "triton.txt")]
    print("set-up: installing flashcore and its tools", flush=True)
    pip(python, *constraints, "--editable", f"{ROOT}[bench,demo,dev,test]")


def torch_asks_for_triton(python: Path) -> bool:
    question = "import importlib.metadata; print(*importlib.metadata.requires('torch'), sep='\\n')"
    answer = subprocess.run([str(python), "-c", question], capture_output=True, text=True, check=True)
    return any(line.startswith("triton") for line in answer.stdout.splitlines())


def pip(python: Path, *arguments: str) -> None:
    volume = [] if sys.stdout.isatty() else ["--quiet", "--quiet"]
    run([str(python), "-m", "pip", "--disable-pip-version-check", "install", *volume, *arguments])


def run(command: list[str]) -> None:
    if subprocess.run(command).returncode != 0:
        raise SetupError(f"this failed, its own message is above: {' '.join(command)}")


def venv_python(venv: Path) -> Path:
    return venv / "bin" / "python"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
