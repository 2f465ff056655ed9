"""The house rules that a machine can check: imports point downward, and no C or CUDA sources are shipped."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# What each package must never import.
FORBIDDEN = {
    "csrc_free_kernels": {"flashcore_ops", "transformers", "bench", "tests"},
    "flashcore_ops": {"bench", "tests"},
    # Integrations know models, not kernels.
    "flashcore_ops/integrations": {"csrc_free_kernels"},
}
# Deploying runs no model, so it needs none of what runs them; the host does, for what is in on_host.
HEAVY = {"csrc_free_kernels", "huggingface_hub", "numpy", "torch", "transformers", "triton"}


def imported_packages(path: Path) -> set[str]:
    packages = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            packages |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            packages.add(node.module.split(".")[0])
    return packages


@pytest.mark.parametrize("package", FORBIDDEN)
def test_imports_point_downward(package):
    files = list((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        assert not imported_packages(path) & FORBIDDEN[package], path


def test_deploying_needs_nothing_that_runs_models():
    files = [*(ROOT / "flashcore_ops" / "deployment").glob("*.py"), ROOT / "flashcore_ops" / "commands" / "deploy.py"]
    assert len(files) > 2
    for path in files:
        assert not imported_packages(path) & HEAVY, path


@pytest.mark.parametrize("package", ["csrc_free_kernels", "flashcore_ops"])
def test_no_compiled_sources(package):
    suffixes = {".c", ".cc", ".cpp", ".cu", ".cuh", ".h", ".hpp", ".ptx", ".so"}
    assert not [path for path in (ROOT / package).rglob("*") if path.suffix in suffixes]


def test_kernels_register_no_ops():
    for path in (ROOT / "csrc_free_kernels").glob("*.py"):
        assert "torch.library" not in path.read_text(), path


def test_import_is_light():
    """The package imports without triton and without transformers, which take seconds or may be absent."""
    script = (
        "import sys; sys.modules['triton'] = None; sys.modules['transformers'] = None\n"
        "import torch, flashcore_ops\n"
        "q = torch.randn(1, 2, 3, 16); print(flashcore_ops.attention(q, q, q).shape)"
    )
    finished = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert finished.stdout.strip() == "torch.Size([1, 2, 3, 16])", finished.stderr
