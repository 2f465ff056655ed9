"""Which files a deployment copies: from a checkout, from sources without git, from an installed package."""

from __future__ import annotations

import os
import shutil
from importlib.metadata import PathDistribution
from pathlib import Path

import pytest

from flashcore_ops.deployment import project
from flashcore_ops.deployment.project import stage_project
from flashcore_ops.errors import DeploymentError
from tests.deployment.stand_in import make_project

needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
ROOT = project.ROOT
NEEDED = ["pyproject.toml", "README.md", "LICENSE", "scripts/setup_env.py", "constraints/cpu.txt"]
NEEDED += ["flashcore_ops/cli.py", "flashcore_ops/py.typed", "csrc_free_kernels/decode.py"]


@needs_git
def test_digest_follows_names_modes_and_contents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_project(tmp_path / "root")
    monkeypatch.setattr(project, "ROOT", root)
    digests = [stage_project(tmp_path / "first").digest]
    assert stage_project(tmp_path / "again").digest == digests[0]
    changes = [
        lambda: (root / "pyproject.toml").write_text("other\n"),
        lambda: (root / "pyproject.toml").chmod(0o755),
        lambda: (root / "pyproject.toml").unlink(),
    ]
    for number, change in enumerate(changes):
        change()
        digests.append(stage_project(tmp_path / str(number)).digest)
    assert len(set(digests)) == len(digests)


def copy_of_the_sources(target: Path) -> None:
    for name in ("constraints", "csrc_free_kernels", "flashcore_ops", "scripts"):
        shutil.copytree(ROOT / name, target / name)
    for name in ("LICENSE", "README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, target)


def test_sources_without_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "root"
    copy_of_the_sources(root)
    (root / "flashcore_ops" / ".env").touch()
    (root / "notes.txt").touch()
    monkeypatch.setattr(project, "ROOT", root)
    staged = stage_project(tmp_path / "staged")
    files = {path.relative_to(staged.directory).as_posix() for path in staged.directory.rglob("*") if path.is_file()}
    assert files.issuperset(NEEDED)
    assert staged.left_out == ("flashcore_ops/.env",)
    assert not [name for name in files if "__pycache__" in name or name in ("notes.txt", "flashcore_ops/.env")]


def test_installed_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Laid out as pip lays out the wheel that pyproject.toml's data-files make."""
    site, shared = tmp_path / "lib" / "site-packages", tmp_path / "share" / "flashcore"
    copy_of_the_sources(shared)
    site.mkdir(parents=True)
    for package in ("csrc_free_kernels", "flashcore_ops"):
        (shared / package).rename(site / package)
    information = site / "flashcore-0.1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Name: flashcore\n")
    paths = [path for directory in (site, shared) for path in directory.rglob("*") if path.is_file()]
    recorded = [os.path.relpath(path, site) for path in paths]
    (information / "RECORD").write_text("".join(f"{name},,\n" for name in recorded))
    monkeypatch.setattr(project, "ROOT", site)
    monkeypatch.setattr(project, "distribution", lambda name: PathDistribution(information))
    staged = stage_project(tmp_path / "staged")
    found = {path.relative_to(staged.directory).as_posix() for path in staged.directory.rglob("*") if path.is_file()}
    assert found.issuperset(NEEDED)
    assert not [name for name in found if name.startswith(("share", "lib", "flashcore-"))]


def test_no_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(project, "ROOT", tmp_path)
    monkeypatch.setattr(project, "DISTRIBUTION", "no-such-distribution")
    with pytest.raises(DeploymentError, match="neither at"):
        stage_project(tmp_path / "staged")
