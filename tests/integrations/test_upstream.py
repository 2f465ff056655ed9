"""transformers' own tests of its sdpa attention against eager pass with FlashCore's attention in sdpa's place."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from flashcore_ops.default_model import CACHE_VARIABLE
from tests.integrations.upstream import distribution
from tests.integrations.upstream.distribution import DistributionError, modeling_tests
from tests.integrations.upstream.run import FAMILIES, OURS, STOCK, Run, arguments_of, broken

ROOT = Path(__file__).parents[2]
# torch's SDPA leaves out Gemma 2's softcap, and transformers' GPT-OSS refuses it for want of sinks.
STOCK_OUTCOMES = {"gemma2": "failed", "gpt-oss": "skipped"}
# Two layers of a model with each of four heads.
NUM_CALLS = 2 * 4


@pytest.fixture(scope="session")
def tests_of_transformers() -> Path:
    """The file, fetched on first use; where that fails, tests skip, but fail under CI."""
    pytest.importorskip("parameterized")
    try:
        return modeling_tests()
    except DistributionError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def runs(tests_of_transformers: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    # Threads cost more than they save in models as small as these.
    env = os.environ | {"TRANSFORMERS_TEST_DEVICE": "cpu", "OMP_NUM_THREADS": "1"}
    directory = tmp_path_factory.mktemp("upstream")

    def run(families: tuple[str, ...]) -> list[Run]:
        results = directory / f"{families[0]}.json"
        arguments = [str(tests_of_transformers), str(results), *families]
        command = [sys.executable, "-m", "tests.integrations.upstream.run", *arguments]
        finished = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
        assert finished.returncode == 0, finished.stderr[-8000:]
        return [Run(**entry) for entry in json.loads(results.read_text())]

    # Half a minute of one core, so two share it.
    with ThreadPoolExecutor() as pool:
        return [entry for half in pool.map(run, (FAMILIES[::2], FAMILIES[1::2])) for entry in half]


def by_test(runs: list[Run], family: str, attention: str) -> dict[str, Run]:
    return {run.test: run for run in runs if (run.family, run.attention) == (family, attention)}


def asks_for_weights(test: str) -> bool:
    return test.endswith("output_attentions")


@pytest.mark.parametrize("family", FAMILIES)
def test_all_that_run_with_sdpa_pass_with_ours(runs: list[Run], family: str) -> None:
    stock, ours = by_test(runs, family, STOCK), by_test(runs, family, OURS)
    assert len(stock) == 25
    assert {run.outcome for run in stock.values() if not asks_for_weights(run.test)} == {
        STOCK_OUTCOMES.get(family, "passed")
    }
    assert stock.keys() == ours.keys()
    assert [run for run in ours.values() if run.outcome != "passed" and not asks_for_weights(run.test)] == []


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_weights_are_refused(runs: list[Run], family: str) -> None:
    """Stock sdpa logs that it gives none, and transformers skips the test at the first head that cannot ask."""
    (test,) = filter(asks_for_weights, by_test(runs, family, OURS))
    assert by_test(runs, family, STOCK)[test].outcome != "passed"
    assert by_test(runs, family, OURS)[test].reason.startswith("OptionError: output_attentions: expected False")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_called_ours(runs: list[Run], family: str) -> None:
    """And through it the op, except under right padding, which takes the dense path."""
    assert {(run.num_calls, run.num_op_calls) for run in by_test(runs, family, STOCK).values()} == {(0, 0)}
    passed = [run for run in by_test(runs, family, OURS).values() if run.outcome == "passed"]
    for run in passed:
        is_dense = "pad_right" in run.test and "no_attn_mask" not in run.test
        assert (run.num_calls, run.num_op_calls) == (NUM_CALLS, 0 if is_dense else NUM_CALLS), run.test


@pytest.mark.parametrize(("family", "argument"), [(name, lost) for name in FAMILIES for lost in arguments_of(name)])
def test_the_tests_notice_a_lost_argument(runs: list[Run], family: str, argument: str) -> None:
    (run,) = by_test(runs, family, broken(argument)).values()
    assert by_test(runs, family, OURS)[run.test].outcome == "passed"
    assert run.reason.startswith("ValueError: mean relative difference")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache directory in force, and no package index."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setattr(distribution, "version", lambda name: "5.99")
    return tmp_path / "cache"


def test_without_a_network_the_error_says_so(cache: Path) -> None:
    pytest.importorskip("pip")
    with pytest.raises(DistributionError, match=r"source of transformers==5\.99: No matching distribution found"):
        modeling_tests()
    assert list((cache / "transformers-5.99").iterdir()) == []


@pytest.mark.parametrize("member", ["test_modeling_common.py", "other.py"])
def test_the_file_is_kept_whole_or_not_at_all(cache: Path, monkeypatch: pytest.MonkeyPatch, member: str) -> None:
    (cache.parent / "file").write_text("tests")

    def download(directory: Path) -> Path:
        archive = directory / "transformers-5.99.tar.gz"
        with tarfile.open(archive, "w:gz") as members:
            members.add(cache.parent / "file", f"transformers-5.99/tests/{member}")
        return archive

    monkeypatch.setattr(distribution, "_download", download)
    kept = cache / "transformers-5.99" / "test_modeling_common.py"
    if member != kept.name:
        with pytest.raises(DistributionError, match=r"5\.99\.tar\.gz has no tests/test_modeling_common\.py"):
            modeling_tests()
        assert list(kept.parent.iterdir()) == []
        return
    assert modeling_tests() == kept
    assert list(kept.parent.iterdir()) == [kept]
    # It is found, not fetched again.
    monkeypatch.setattr(distribution, "_download", None)
    assert modeling_tests().read_text() == "tests"
