"""The set-up: says in one line what it needs, replaces what is stale, never deletes what is not its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from scripts import setup_env
from scripts.setup_env import SetupError

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def installs(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Replaces the making of an environment by a link to this interpreter; lists the environments made."""
    made: list[Path] = []

    def run(command: list[str]) -> None:
        python = setup_env.venv_python(Path(command[-1]))
        python.parent.mkdir(parents=True)
        python.symlink_to(sys.executable)

    monkeypatch.setattr(setup_env, "run", run)
    monkeypatch.setattr(setup_env, "install", made.append)
    monkeypatch.setattr(setup_env, "missing_tools", list)
    return made


def test_environment_is_made_once(tmp_path: Path, installs: list[Path]) -> None:
    venv = tmp_path / "venv"
    for _ in range(2):
        assert setup_env.main([str(venv)]) == 0
    assert installs == [venv / "bin" / "python"]


def test_current_environment_needs_no_tools(
    tmp_path: Path, installs: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert setup_env.main([str(tmp_path / "venv")]) == 0
    monkeypatch.setattr(setup_env, "missing_tools", lambda: [("a C compiler", "gcc")])
    assert setup_env.main([str(tmp_path / "venv")]) == 0
    assert setup_env.main([str(tmp_path / "other")]) == 1


def test_interrupted_set_up_starts_over(tmp_path: Path, installs: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(python: Path) -> None:
        raise KeyboardInterrupt

    venv = tmp_path / "venv"
    with monkeypatch.context() as patch:
        patch.setattr(setup_env, "install", interrupt)
        with pytest.raises(KeyboardInterrupt):
            setup_env.main([str(venv)])
    (venv / "half-installed").touch()
    assert setup_env.main([str(venv)]) == 0
    assert len(installs) == 1
    assert not (venv / "half-installed").exists()


def test_broken_interpreter_is_replaced(tmp_path: Path, installs: list[Path]) -> None:
    venv = tmp_path / "venv"
    setup_env.main([str(venv)])
    python = setup_env.venv_python(venv)
    python.unlink()
    python.symlink_to(tmp_path / "removed")
    assert setup_env.main([str(venv)]) == 0
    assert len(installs) == 2


def test_environment_of_another_tool_is_left_alone(
    tmp_path: Path, installs: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "precious").touch()
    assert setup_env.main([str(tmp_path)]) == 1
    assert (tmp_path / "precious").exists()
    assert capsys.readouterr().err == (
        f"set-up: {tmp_path} was made by something else. Move it away, or name another: make VENV=...\n"
    )


def test_changed_requirements_and_moved_checkouts_are_stale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(ROOT / "constraints", tmp_path / "constraints")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    monkeypatch.setattr(setup_env, "ROOT", tmp_path)
    venv = tmp_path / ".venv"
    before = setup_env.fingerprint(venv)
    assert setup_env.fingerprint(tmp_path / "moved") != before
    with (tmp_path / "pyproject.toml").open("a") as file:
        file.write("\n[tool.other]\nsetting = 1\n")
    assert setup_env.fingerprint(venv) == before
    (tmp_path / "constraints" / "cpu.txt").write_text("torch==2.12.0\n")
    assert setup_env.fingerprint(venv) != before


def test_another_python_version_is_stale(tmp_path: Path, installs: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    venv = tmp_path / "venv"
    for version, made in [((3, 11, 1), 1), ((3, 11, 9), 1), ((3, 12, 0), 2)]:
        monkeypatch.setattr(sys, "version_info", (*version, "final", 0))
        assert setup_env.main([str(venv)]) == 0
        assert len(installs) == made


def test_where_the_interpreter_lies_does_not_matter(
    tmp_path: Path, installs: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    venv = tmp_path / "venv"
    assert setup_env.main([str(venv)]) == 0
    monkeypatch.setattr(sys, "executable", str(setup_env.venv_python(venv)))
    monkeypatch.setattr(sys, "_base_executable", "/another/python", raising=False)
    assert setup_env.main([str(venv)]) == 0
    assert len(installs) == 1


@pytest.mark.parametrize(("asks", "pinned"), [(True, False), (False, True)])
def test_triton_is_pinned_only_where_torch_asks_for_none(
    monkeypatch: pytest.MonkeyPatch, asks: bool, pinned: bool
) -> None:
    calls: list[tuple[str, ...]] = []
    monkeypatch.setattr(setup_env, "pip", lambda python, *arguments: calls.append(arguments))
    monkeypatch.setattr(setup_env, "torch_asks_for_triton", lambda python: asks)
    setup_env.install(Path("python"))
    torch, flashcore = calls
    assert torch[-1] == "torch"
    assert not any("triton" in argument for argument in torch)
    assert any(argument.endswith("triton.txt") for argument in flashcore) is pinned


@pytest.mark.parametrize(("gpu", "constraints"), [(True, "nvidia.txt"), (False, "cpu.txt")])
def test_machine_chooses_the_torch(monkeypatch: pytest.MonkeyPatch, gpu: bool, constraints: str) -> None:
    calls: list[tuple[str, ...]] = []
    monkeypatch.setattr(setup_env, "pip", lambda python, *arguments: calls.append(arguments))
    monkeypatch.setattr(setup_env, "torch_asks_for_triton", lambda python: gpu)
    monkeypatch.setattr(setup_env, "has_nvidia_gpu", lambda: gpu)
    monkeypatch.setenv(setup_env.INDEX_VARIABLE, "https://example.org/index")
    setup_env.install(Path("python"))
    torch, flashcore = calls
    assert Path(torch[1]).name == Path(flashcore[1]).name == constraints
    assert torch[2:] == ("--extra-index-url", "https://example.org/index", "torch")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has Triton, which needs the compilers")
def test_missing_compilers_are_one_line(tmp_path: Path) -> None:
    environment = {"PATH": str(tmp_path), "HOME": str(tmp_path)}
    command = [sys.executable, ROOT / "scripts" / "setup_env.py", tmp_path / "venv"]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert finished.returncode == 1
    assert finished.stdout == ""
    assert finished.stderr.count("\n") == 1
    assert "a C compiler and a C++ compiler" in finished.stderr
    assert " gcc g++" in finished.stderr
    assert not (tmp_path / "venv").exists()


@pytest.mark.parametrize(
    ("variable", "value", "package"), [("CC", "no-such-compiler", "gcc"), ("CXX", "no-such-compiler", "g++")]
)
def test_compiler_named_by_the_environment_must_exist(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, package: str
) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv(variable, value)
    assert package in [name for _, name in setup_env.missing_tools()]


def test_missing_venv_and_headers_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setitem(sys.modules, "ensurepip", None)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(setup_env, "has_compiler", lambda variable, names: True)
    with pytest.raises(SetupError) as raised:
        setup_env.check_tools()
    assert str(raised.value) == (
        "needs Python's venv module with pip and Python's C headers. "
        "On Debian or Ubuntu: apt-get install python3-venv python3-dev"
    )


def test_old_python_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 10, 4, "final", 0))
    assert setup_env.main([]) == 1
    assert "needs Python 3.11 or newer" in capsys.readouterr().err


def test_failing_command_is_named() -> None:
    with pytest.raises(SetupError, match=r"its own message is above: .* exit\(3\)"):
        setup_env.run([sys.executable, "-c", "exit(3)"])


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize(
    "prompt", ["The capital of France is", 'it\'s $HOME "quoted" `x` #1 \\n $$', "def f(n):\n    "]
)
@pytest.mark.parametrize("through", ["argument", "environment"])
def test_make_generate_passes_the_prompt_as_it_is(tmp_path: Path, prompt: str, through: str) -> None:
    command = tmp_path / "bin" / "flashcore"
    command.parent.mkdir()
    command.write_text('#!/bin/sh\nprintf "<%s>" "$@"\n')
    command.chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "PROMPT")}
    variables = ["PYTHON=true", f"VENV={tmp_path}"]
    if through == "argument":
        variables.append(f"PROMPT={prompt}")
    else:
        environment["PROMPT"] = prompt
    finished = subprocess.run(
        ["make", "--no-print-directory", "generate", *variables],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert finished.stdout == f"<generate><--prompt><{prompt}>"


def test_project_requirements_admit_the_tested_versions() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    wanted = {
        requirement.name: requirement.specifier
        for requirement in map(Requirement, [*project["dependencies"], *(line for extra in extras for line in extra)])
    }
    lines = [line for file in (ROOT / "constraints").glob("*.txt") for line in file.read_text().splitlines()]
    tested = [Requirement(line) for line in lines if line and not line.startswith(("#", "-c"))]
    assert {pin.name for pin in tested} == wanted.keys() - {"filelock"}
    for pin in tested:
        version = str(pin.specifier).removeprefix("==")
        assert wanted[pin.name].contains(version), f"{pin} is outside {wanted[pin.name]}"


def test_both_packages_are_typed_and_ci_is_executable() -> None:
    assert (ROOT / "flashcore_ops" / "py.typed").is_file()
    assert (ROOT / "csrc_free_kernels" / "py.typed").is_file()
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
