"""The benchmarks' formulas, cases, targets, timing and results format; the timing itself needs a GPU."""

from __future__ import annotations

import doctest
import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from importlib import import_module
from itertools import pairwise, permutations
from pathlib import Path

import pytest
import torch

from bench import case_groups
from bench.accuracy import make_target, max_abs_error
from bench.case_groups import GROUPS, QUICK
from bench.cases import Case
from bench.harness import calls_per_graph, num_input_sets, take_turns, time_interleaved
from bench.results import Row, Skip, make_meta, write_results
from flashcore_ops import reference
from tests.bench_cases import CEILINGS, CHUNK, DECODE, PREFILL, SORTS, generator

ROOT = Path(__file__).parent.parent
EXAMPLES = ["accuracy", "attention", "case_groups", "cases", "figures", "harness", "plots", "report", "results"]


@pytest.mark.parametrize("module", EXAMPLES)
def test_examples(module):
    failed, attempted = doctest.testmod(import_module(f"bench.{module}"))
    assert failed == 0
    assert attempted > 0


def visible_of(case):
    """Which slots each row sees, bool `[B, Q, S]`."""
    kv_range = case.random_inputs(generator()).kv_range
    return reference.visible_slots(case.query_len, case.kv_len, kv_range, case.is_causal, case.window)


@pytest.mark.parametrize("case", SORTS.values(), ids=SORTS)
def test_flops_count_what_is_visible(case):
    visible = visible_of(case)
    # Half of the score on the diagonal, which only a row whose window is not yet full has beyond its own count.
    column = torch.arange(case.query_len) + case.kv_len - case.query_len
    reach = column - torch.tensor(case.starts)[:, None]
    on_diagonal = (reach >= 0) & ((reach < case.window) if case.window else torch.tensor(True)) & case.is_causal
    expected = 4 * case.num_query_heads * case.head_dim * (visible.sum().item() - on_diagonal.sum().item() / 2)
    assert case.num_flops == expected


@pytest.mark.parametrize("case", SORTS.values(), ids=SORTS)
def test_bytes_are_those_of_the_tensors_that_some_row_sees(case):
    inputs = case.random_inputs(generator())
    seen_slots = visible_of(case).any(dim=1).sum().item()
    bytes_a_slot = inputs.key[0, :, 0].nbytes + inputs.value[0, :, 0].nbytes
    assert case.num_kv_bytes == seen_slots * bytes_a_slot
    assert case.num_bytes == case.num_kv_bytes + 2 * inputs.query.nbytes


def test_prefill_counts_as_the_field_does():
    case = Case(batch=2, query_len=4096, kv_len=4096)
    assert case.num_flops == 4 * 2 * 32 * 4096 * 4096 * 128 // 2


def test_floor_is_the_slower_of_reading_and_computing():
    memory_bound, compute_bound = Case(batch=1, query_len=1, kv_len=8192), Case(batch=1, query_len=8192, kv_len=8192)
    assert memory_bound.floor_us(read_tbs=3.03, matmul_tflops=694) == pytest.approx(11.1, abs=0.05)
    assert memory_bound.tbs(memory_bound.floor_us(read_tbs=3.03, matmul_tflops=694)) == pytest.approx(3.03)
    assert compute_bound.floor_us(read_tbs=3.03, matmul_tflops=694) == pytest.approx(compute_bound.num_flops / 694e6)
    assert compute_bound.tflops(compute_bound.floor_us(read_tbs=3.03, matmul_tflops=694)) == pytest.approx(694)


@pytest.mark.parametrize(
    "wrong",
    [
        {"query_len": 64},
        {"padding": 63},
        {"is_causal": False, "window": 4},
        {"is_causal": False, "padding": 4},
    ],
)
def test_cases_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ValueError, match="expected"):
        replace(CHUNK, **wrong)


def test_padding_grows_evenly():
    case = replace(DECODE, padding=40)
    assert case.starts == [0, 20, 40]
    assert case.random_inputs(generator()).kv_range.tolist() == [[0, 63], [20, 63], [40, 63]]


def test_the_groups_are_what_the_issue_lists():
    assert len(set(GROUPS["decode"])) == 12
    assert [case.batch * case.query_len for case in GROUPS["prefill"]] == [16384] * 6 + [32768]
    assert {case.head_dim for case in GROUPS["head_dims"]} == {64, 96, 256}
    assert {case.group for case in GROUPS["ratios"]} == {1, 7, 8}
    assert {case.query_len for case in GROUPS["speculative"]} == {2, 4, 8, 16}
    assert [(case.query_len, case.kv_len) for case in GROUPS["chunked"]] == [(2048, 8192), (2048, 32768)]
    assert all(
        {case.is_decode for case in GROUPS[name]} == {True, False} for name in ("head_dims", "ratios", "float16")
    )
    for name, option in (("windowed", "window"), ("padded", "padding")):
        with_option = [case for case in GROUPS[name] if getattr(case, option)]
        assert {case.is_decode for case in with_option} == {True, False}
        # The marks compare the two.
        assert all(replace(case, **{option: 0}) in GROUPS[name] for case in with_option)
    assert all(not case.is_causal for case in GROUPS["non_causal"])
    assert {case.dtype for case in GROUPS["float16"]} == {torch.float16}
    assert all(set(QUICK[name]) <= set(GROUPS[name]) for name in QUICK)


def test_cases_are_told_apart():
    cases = {case for group in GROUPS.values() for case in group}
    for describe in (str, lambda case: json.dumps(case.to_json())):
        assert len({describe(case) for case in cases}) == len(cases)
    # As in every results file so far.
    assert list(case_groups.DECODE[0].to_json()) == ["B", "Q", "S", "Hq", "Hkv", "D", "dtype"]


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


@pytest.mark.parametrize("max_scores", [1, 6 * 63 * 5, 2**20])
@pytest.mark.parametrize("case", SORTS.values(), ids=SORTS)
def test_target_in_blocks_is_the_reference(case, max_scores):
    inputs = case.random_inputs(generator())
    tensors = (inputs.query.double(), inputs.key.double(), inputs.value.double())
    exact, _ = reference.attention_with_lse(*tensors, inputs.kv_range, is_causal=case.is_causal, window=case.window)
    target = make_target(inputs, max_scores=max_scores)
    torch.testing.assert_close(target.exact, exact, rtol=0, atol=1e-14)
    assert torch.equal(target.is_padding.squeeze(), ~visible_of(case).any(dim=2).squeeze())
    assert 0 < target.bar < 0.1


def test_only_padding_may_hold_anything():
    target = make_target(replace(PREFILL, padding=40).random_inputs(generator()))
    output = target.exact.masked_fill(target.is_padding, torch.nan)
    assert max_abs_error(output, target) == 0
    output[-1, 0, 40, 3] += 0.5
    assert max_abs_error(output, target) == pytest.approx(0.5)


def test_results_file(tmp_path):
    meta = make_meta("NVIDIA H100 80GB HBM3", CEILINGS)
    rows = [Row(DECODE, "flashcore", "us", 9.700012), Row(DECODE, "floor", "us", 1e-7 / 3)]
    path = write_results(tmp_path, "attention", meta, rows, [Skip(DECODE, "peer", "cannot run")])
    assert path == tmp_path / "nvidia-h100-80gb-hbm3" / "attention.json"
    written = json.loads(path.read_text())
    assert list(written) == ["meta", "rows", "skips"]
    assert set(written["meta"]) == {"gpu", "torch", "triton", "transformers", "commit", "date", "ceilings"}
    assert written["meta"]["torch"] == torch.__version__
    assert set(written["meta"]["ceilings"]) == {"copy_tbs", "read_tbs", "matmul_tflops", "graph_kernel_us"}
    case = {"B": 3, "Q": 1, "S": 63, "Hq": 6, "Hkv": 2, "D": 16, "dtype": "bfloat16"}
    assert written["rows"][0] == {"case": case, "impl": "flashcore", "metric": "us", "value": 9.7}
    assert written["rows"][1]["value"] == pytest.approx(1e-7 / 3, rel=1e-4)
    assert written["skips"] == [{"case": case, "impl": "peer", "reason": "cannot run"}]
    windowed, non_causal = (SORTS[sort].to_json() for sort in ("windowed decode", "non-causal"))
    assert windowed == case | {"window": 17}
    assert non_causal == case | {"Q": 63, "is_non_causal": 1}


def test_results_refuse_nan(tmp_path):
    with pytest.raises(ValueError, match="JSON compliant"):
        write_results(tmp_path, "attention", {"gpu": "x"}, [Row(DECODE, "flashcore", "us", torch.nan)], [])


def test_given_commit_is_recorded():
    assert make_meta("x", CEILINGS, commit="abc")["commit"] == "abc"


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
    assert DECODE.random_inputs(torch.Generator("cuda")).query.isfinite().all()


@pytest.mark.gpu
def test_timing_is_in_proportion():
    calls = {str(share): lambda cycles, share=share: torch.cuda._sleep(share * cycles) for share in (1, 3)}

    def ratio() -> float:
        microseconds = time_interleaved(calls, inputs=[200_000], num_calls=10, repeats=5).microseconds
        return microseconds["3"] / microseconds["1"]

    # Other processes may share the GPU.
    assert any(ratio() == pytest.approx(3, rel=0.1) for _ in range(20))


@pytest.mark.parametrize("size", range(2, 12))
def test_every_implementation_runs_behind_each_of_the_others_equally_often(size: int) -> None:
    names = [str(number) for number in range(size)]
    turns = list(take_turns(names, repeats=2 * size))
    rounds = [turns[first : first + size] for first in range(0, len(turns), size)]
    assert all(sorted(round_) == sorted(names) for round_ in rounds)
    neighbours = Counter(pair for round_ in rounds for pair in pairwise(round_))
    assert set(neighbours) == set(permutations(names, 2))
    assert set(neighbours.values()) == {2}
