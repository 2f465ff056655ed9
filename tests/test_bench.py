"""The benchmarks' formulas, peers, judgement and results format; the timing itself needs a GPU."""

from __future__ import annotations

import doctest
import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import typer
from torch.nn.attention import SDPBackend
from typer.testing import CliRunner

from bench import attention
from bench.accuracy import make_target, max_abs_error
from bench.attention import judge, measure_case, measure_cases
from bench.cases import DECODE, PREFILL, QUICK_DECODE, QUICK_PREFILL, Case
from bench.harness import Ceilings, Timing, calls_per_graph, num_input_sets, time_interleaved
from bench.peers import FLASHCORE, PEERS, HuggingFaceStaticCache, Sdpa
from bench.report import render_skips, render_table
from bench.results import Row, Skip, make_meta, write_results
from flashcore_ops import reference

ROOT = Path(__file__).parent.parent
GENERATOR = torch.Generator().manual_seed(0)
CEILINGS = Ceilings(copy_tbs=3.0, read_tbs=3.0, matmul_tflops=700.0, graph_kernel_us=1.25)
SMALL_DECODE = Case(batch=2, query_len=1, kv_len=33, num_query_heads=6, num_kv_heads=2, head_dim=16)
SMALL_PREFILL = replace(SMALL_DECODE, query_len=33)
MATH = Sdpa("sdpa_math", SDPBackend.MATH)


@pytest.mark.parametrize("module", ["accuracy", "cases", "harness", "report", "results"])
def test_examples(module):
    failed, attempted = doctest.testmod(import_module(f"bench.{module}"))
    assert failed == 0
    assert attempted > 0


def test_flops_count_what_is_visible():
    case = replace(SMALL_PREFILL, query_len=8, kv_len=20)
    visible = reference.visible_slots(8, 20).sum().item()
    exact = 4 * case.batch * case.num_query_heads * case.head_dim * visible
    half_diagonal = 4 * case.batch * case.num_query_heads * case.head_dim * 8 // 2
    assert case.num_flops == exact - half_diagonal


def test_bytes_are_those_of_the_tensors():
    inputs = SMALL_PREFILL.random_inputs(GENERATOR)
    output = torch.empty_like(inputs.query)
    assert SMALL_PREFILL.num_bytes == sum(t.nbytes for t in (inputs.query, inputs.key, inputs.value, output))
    assert SMALL_PREFILL.num_kv_bytes == inputs.key.nbytes + inputs.value.nbytes


def test_floor_is_the_slower_of_reading_and_computing():
    memory_bound, compute_bound = Case(batch=1, query_len=1, kv_len=8192), Case(batch=1, query_len=8192, kv_len=8192)
    assert memory_bound.floor_us(read_tbs=3.03, matmul_tflops=694) == pytest.approx(11.1, abs=0.05)
    assert compute_bound.floor_us(read_tbs=3.03, matmul_tflops=694) == pytest.approx(compute_bound.num_flops / 694e6)
    assert compute_bound.tflops(compute_bound.floor_us(read_tbs=3.03, matmul_tflops=694)) == pytest.approx(694)


def test_cases():
    assert len(set(DECODE)) == 12
    assert [case.batch * case.query_len for case in PREFILL] == [16384] * 6 + [32768]
    assert set(QUICK_DECODE) <= set(DECODE)
    assert set(QUICK_PREFILL) <= set(PREFILL)


@pytest.mark.parametrize("num_bytes", [100, 10**6, 10**9])
def test_rotation_exceeds_the_l2(num_bytes):
    l2_bytes = 50 * 2**20
    sets = num_input_sets(num_bytes, l2_bytes)
    assert sets >= 2
    assert (sets - 1) * num_bytes >= 4 * l2_bytes or num_bytes >= 4 * l2_bytes


@pytest.mark.parametrize(("call_us", "num_inputs"), [(0.5, 100), (10, 3), (1e5, 2), (700, 7)])
def test_graphs_hold_whole_rounds(call_us, num_inputs):
    calls = calls_per_graph(call_us, num_inputs)
    assert calls >= 2
    assert calls % num_inputs == 0


@pytest.mark.parametrize("max_scores", [1, 6 * 33 * 5, 2**20])
def test_target_in_blocks_is_the_reference(max_scores):
    inputs = replace(SMALL_PREFILL, query_len=7).random_inputs(GENERATOR)
    exact, _ = reference.attention_with_lse(inputs.query.double(), inputs.key.double(), inputs.value.double())
    target = make_target(inputs, max_scores=max_scores)
    torch.testing.assert_close(target.exact, exact, rtol=0, atol=1e-14)
    assert 0 < target.bar < 0.1


@pytest.mark.parametrize("case", [SMALL_DECODE, SMALL_PREFILL], ids=str)
@pytest.mark.parametrize("implementation", [FLASHCORE, MATH, replace(MATH, repeat_heads=True)])
def test_implementations_are_right_on_the_cpu(case, implementation):
    inputs = case.random_inputs(GENERATOR)
    error, reason = judge(implementation, inputs, make_target(inputs))
    assert reason == ""
    assert error > 0


def test_hugging_face_static_cache():
    inputs = SMALL_DECODE.random_inputs(GENERATOR)
    target = make_target(inputs)
    assert judge(HuggingFaceStaticCache(), inputs, target)[1] == ""
    # The mask is obeyed: slots that it hides change the answer.
    inputs.mask[..., 10:] = False
    assert max_abs_error(HuggingFaceStaticCache()(inputs), target) > 10 * target.bar
    assert "decode" in HuggingFaceStaticCache().why_not(SMALL_PREFILL.random_inputs(GENERATOR))


def test_peers_say_why_not():
    chunk = replace(SMALL_PREFILL, query_len=4).random_inputs(GENERATOR)
    assert "top left" in MATH.why_not(chunk)
    for peer in PEERS:
        if isinstance(peer, Sdpa):
            assert peer.why_not(SMALL_DECODE.random_inputs(GENERATOR))


@dataclass(frozen=True)
class Scaled:
    """A right answer times a factor, or an exception."""

    name: str
    factor: float

    def why_not(self, inputs):
        return "it is told not to" if self.factor == 0 else None

    def __call__(self, inputs):
        if self.factor < 0:
            raise RuntimeError("first line\nsecond line")
        return MATH(inputs) * self.factor


@dataclass
class FakeTimer:
    """Remembers what it was asked to time; 2 us each, and one named failure."""

    timed: tuple[str, ...] = ()

    def __call__(self, calls, inputs, num_calls):
        self.timed += tuple(calls)
        assert num_calls % len(inputs) == 0
        failures = {name: "capture failed" for name in calls if name == "uncapturable"}
        return Timing({name: 2.0 for name in calls if name not in failures}, failures)


def measure_small(case, implementations, timer):
    return measure_case(case, implementations, floor_us=1.0, l2_bytes=1000, generator=GENERATOR, timer=timer)


@pytest.mark.parametrize(
    ("factor", "reason"),
    [
        (1.3, "wrong: error"),
        (torch.nan, "wrong: error nan"),
        (-1.0, "failed: RuntimeError: first line"),
        (0.0, "cannot run: it is told not to"),
    ],
)
def test_wrong_results_are_never_timed(factor, reason):
    timer = FakeTimer()
    rows, skips = measure_small(SMALL_DECODE, [Scaled("right", 1.0), Scaled("other", factor)], timer)
    assert timer.timed == ("right",)
    assert {row.impl for row in rows} == {"floor", "right"}
    assert [skip.impl for skip in skips] == ["other"]
    assert skips[0].reason.startswith(reason)


def test_capture_failure_is_reported():
    rows, skips = measure_small(SMALL_PREFILL, [Scaled("right", 1.0), Scaled("uncapturable", 1.0)], FakeTimer())
    assert skips == [Skip(SMALL_PREFILL, "uncapturable", "failed: capture failed")]
    values = {row.metric: row.value for row in rows if row.impl == "right"}
    assert values["us"] == 2.0
    assert values["tflops"] == SMALL_PREFILL.num_flops / 2.0 / 1e6
    assert 0 < values["max_abs_err"] < 0.1


def test_a_failing_case_does_not_end_the_run():
    broken = replace(SMALL_DECODE, num_kv_heads=4)
    results = list(
        measure_cases(
            [broken, SMALL_DECODE], [MATH], ceilings=CEILINGS, l2_bytes=1000, generator=GENERATOR, timer=FakeTimer()
        )
    )
    assert [len(skips) for _, skips in results] == [1, 0]
    assert results[0][1][0].reason.startswith("failed: ")
    assert {row.impl for row in results[1][0]} == {"floor", "sdpa_math"}


def test_results_file(tmp_path):
    meta = make_meta("NVIDIA H100 80GB HBM3", CEILINGS)
    rows = [Row(SMALL_DECODE, "flashcore", "us", 9.700012), Row(SMALL_DECODE, "floor", "us", 1e-7 / 3)]
    path = write_results(tmp_path, "attention", meta, rows, [Skip(SMALL_DECODE, "peer", "cannot run")])
    assert path == tmp_path / "nvidia-h100-80gb-hbm3" / "attention.json"
    written = json.loads(path.read_text())
    assert list(written) == ["meta", "rows", "skips"]
    assert set(written["meta"]) == {"gpu", "torch", "triton", "transformers", "commit", "date", "ceilings"}
    assert written["meta"]["torch"] == torch.__version__
    assert set(written["meta"]["ceilings"]) == {"copy_tbs", "read_tbs", "matmul_tflops", "graph_kernel_us"}
    case = {"B": 2, "Q": 1, "S": 33, "Hq": 6, "Hkv": 2, "D": 16, "dtype": "bfloat16"}
    assert written["rows"][0] == {"case": case, "impl": "flashcore", "metric": "us", "value": 9.7}
    assert written["rows"][1]["value"] == pytest.approx(1e-7 / 3, rel=1e-4)
    assert written["skips"] == [{"case": case, "impl": "peer", "reason": "cannot run"}]


def test_results_refuse_nan(tmp_path):
    with pytest.raises(ValueError, match="JSON compliant"):
        write_results(tmp_path, "attention", {"gpu": "x"}, [Row(SMALL_DECODE, "flashcore", "us", torch.nan)], [])


def test_given_commit_is_recorded():
    assert make_meta("x", CEILINGS, commit="abc")["commit"] == "abc"


def test_table_and_skips():
    rows = [Row(SMALL_DECODE, impl, "us", us) for impl, us in [("floor", 1.0), ("flashcore", 4.0), ("a", 5.0)]]
    table = render_table("Decode, us", [SMALL_DECODE], ["flashcore", "a", "absent"], rows, metric="us")
    columns = {column.header: list(column.cells) for column in table.columns}
    assert columns == {
        "B x S": ["2 x 33"],
        "floor": ["1.0"],
        "flashcore": ["4.0"],
        "a": ["5.0"],
        "speed / best peer": ["1.25"],
    }
    lines = render_skips([Skip(case, "absent", "cannot run: no") for case in (SMALL_DECODE, SMALL_PREFILL)])
    assert lines == ["skipped absent, cannot run: no (decode 2 x 33, prefill 2 x 33)"]


@pytest.mark.parametrize(("failing", "status"), [("sdpa_flash", 0), ("flashcore", 1)])
def test_command(monkeypatch, tmp_path, failing, status):
    """The command around the measurements, which are made up."""

    def measured(cases, implementations, **_):
        for case in cases:
            timed = [item.name for item in implementations if item.name != failing]
            rows = [Row(case, name, metric, 7.25) for name in timed for metric in ("us", "tflops")]
            yield rows, [Skip(case, failing, "failed: [odd] text")]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(name="Some GPU", L2_cache_size=2**20)
    )
    monkeypatch.setattr(torch, "Generator", lambda device: GENERATOR)
    monkeypatch.setattr(attention, "measure_ceilings", lambda repeats: CEILINGS)
    monkeypatch.setattr(attention, "measure_cases", measured)
    app = typer.Typer()
    app.command()(attention.main)
    finished = CliRunner().invoke(app, ["--quick", "--output", str(tmp_path), "--commit", "abc"])
    assert finished.exit_code == status, finished.output
    written = json.loads((tmp_path / "some-gpu" / "attention-quick.json").read_text())
    assert len(written["skips"]) == len(QUICK_DECODE + QUICK_PREFILL)
    assert written["meta"]["commit"] == "abc"
    assert f"skipped {failing}, failed: [odd] text (decode 1 x 512, decode 1 x 8192" in finished.output
    assert "7.2" in finished.output


@pytest.mark.parametrize("command", ["bench.attention", "bench.llama", "bench.tune"])
def test_no_gpu_is_one_plain_line(command):
    finished = subprocess.run(
        [sys.executable, "-m", command],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 2
    assert finished.stdout == ""
    assert finished.stderr == f"error: {command} needs a CUDA GPU, and torch sees none.\n"


@pytest.mark.gpu
def test_timing_survives_a_call_that_cannot_be_captured():
    timing = time_interleaved(
        {"synchronises": lambda item: item.sum().item(), "sums": lambda item: item.sum()},
        inputs=[torch.randn(2**20, device="cuda") for _ in range(2)],
        num_calls=10,
        repeats=3,
    )
    assert list(timing.failures) == ["synchronises"]
    assert 0.5 < timing.microseconds["sums"] < 1000
    assert SMALL_DECODE.random_inputs(torch.Generator("cuda")).query.isfinite().all()


@pytest.mark.gpu
@pytest.mark.skipif("PYTEST_XDIST_WORKER" in os.environ, reason="other workers share the GPU")
def test_timing_is_in_proportion():
    calls = {str(share): lambda cycles, share=share: torch.cuda._sleep(share * cycles) for share in (1, 3)}
    microseconds = time_interleaved(calls, inputs=[200_000], num_calls=10, repeats=5).microseconds
    assert microseconds["3"] / microseconds["1"] == pytest.approx(3, rel=0.1)


@pytest.mark.gpu
@pytest.mark.parametrize("case", [Case(batch=1, query_len=1, kv_len=512), Case(batch=2, query_len=512, kv_len=512)])
def test_a_case_on_the_gpu(case):
    def timer(calls, inputs, num_calls):
        return time_interleaved(calls, inputs, num_calls=num_calls, repeats=3)

    generator = torch.Generator("cuda").manual_seed(0)
    rows, skips = measure_case(
        case, [FLASHCORE, *PEERS], floor_us=10.0, l2_bytes=2**20, generator=generator, timer=timer
    )
    timed = {row.impl: row.value for row in rows if row.metric == "us"}
    assert 0.5 < timed["flashcore"] < 10_000
    assert not [skip for skip in skips if not skip.reason.startswith("cannot run")]
