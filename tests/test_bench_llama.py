"""bench.llama on the CPU: formulas, implementations, checks and the command, on a tiny model with a made-up clock."""

from __future__ import annotations

import doctest
import json
import subprocess
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import typer
from torch._dynamo.testing import CompileCounter
from transformers import LlamaConfig
from typer.testing import CliRunner

from bench import first_token, fresh_process, llama
from bench.decoders import FLASHCORE_LOOP, IMPLEMENTATIONS, ModelForward, layers_of
from bench.gauge import CudaGauge
from bench.harness import Ceilings
from bench.llama_cases import (
    BATCHES,
    LENGTHS,
    MARGIN_BYTES,
    LlamaCase,
    ModelSizes,
    compile_case,
    decode_cases,
    prefill_cases,
    why_too_large,
)
from bench.llama_report import render_columns, render_decode
from bench.llama_runs import Effort, measure_case
from bench.logits import fill_randomly, logits_of, make_target, relative_error
from bench.models import LLAMA_3_1_8B, logits_after, share
from bench.results import Results, Row, Skip, is_failure, merge, read_mergeable, write_results
from flashcore_ops import is_patched, make_static_cache
from flashcore_ops.model_shapes import random_model, shape_config
from flashcore_ops.validation.float32 import in_float32

ROOT = Path(__file__).parent.parent
CEILINGS = Ceilings(copy_tbs=3.0, read_tbs=3.0, matmul_tflops=700.0, graph_kernel_us=1.25)
SIZES_8B = ModelSizes(step_weights=15_009_849_344, embedding_row=8192, kv_token=131072, num_layers=32, group=4)
TINY = LlamaConfig(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=0.3,
    tie_word_embeddings=False,
)
EFFORT = Effort(rounds=2, tokens=8, steps=4, eager_tokens=3, eager_steps=2)
HF_EAGER, HF_COMPILED, EAGER, COMPILED, LOOP = IMPLEMENTATIONS
DECODE = LlamaCase("decode", "tiny", layers=2, batch=3, length=24, capacity=128)
PREFILL = LlamaCase("prefill", "tiny", layers=2, batch=1, length=24, capacity=128)


@dataclass
class FakeGauge:
    """Every reading of the clock is 5 ms after the one before."""

    free: int = 2**40
    readings: list[float] = field(default_factory=lambda: [0.0])

    def seconds(self):
        self.readings.append(self.readings[-1] + 0.005)
        return self.readings[-1]

    def free_bytes(self):
        return self.free

    def allocated_bytes(self):
        return 2**30

    def restart_peak(self):
        pass

    def peak_bytes(self):
        return 3 * 2**30


@pytest.fixture
def compiled(monkeypatch):
    """Compiled implementations run as they are. The options that they were compiled with."""
    options = []

    def compile_nothing(function, **given):
        options.append(given)
        return function

    monkeypatch.setattr(torch, "compile", compile_nothing)
    return options


@pytest.fixture(scope="module")
def models():
    return share("tiny", random_model(TINY, torch.bfloat16, torch.device("cpu")))


def measure(case, models, implementations, gauge=None, effort=EFFORT):
    return measure_case(case, models, implementations, read_tbs=3.0, effort=effort, gauge=gauge or FakeGauge())


def values(results, case):
    return {(row.impl, row.metric): row.value for row in results.rows if row.case == case}


@pytest.mark.parametrize("module", ["harness", "llama", "llama_cases", "llama_report", "logits", "report", "results"])
def test_examples(module):
    failed, attempted = doctest.testmod(import_module(f"bench.{module}"))
    assert failed == 0
    assert attempted > 0


def test_sizes_are_those_of_the_8b_shape():
    with torch.device("meta"):
        model = random_model(shape_config(LLAMA_3_1_8B), torch.bfloat16, torch.device("meta"))
    assert ModelSizes.of(model) == SIZES_8B
    short = random_model(shape_config(LLAMA_3_1_8B, num_layers=2), torch.bfloat16, torch.device("meta"))
    assert ModelSizes.of(short).num_layers == 2


def test_sizes_of_tied_weights_count_the_table():
    def sizes(**changes):
        config = LlamaConfig(**(TINY.to_dict() | changes))
        return ModelSizes.of(random_model(config, torch.float32, torch.device("meta")))

    assert sizes(tie_word_embeddings=True).step_weights == sizes().step_weights


def test_floor_counts_weights_rows_and_tokens():
    case = decode_cases("8b", 32, batches=[8], lengths=[2048])[0]
    num_bytes = SIZES_8B.step_weights + 8 * 8192 + 8 * 2048 * 131072
    assert SIZES_8B.floor_ms(case, read_tbs=3.03) == pytest.approx(num_bytes / 3.03e12 * 1e3)
    # Capacity beyond the length costs nothing.
    assert SIZES_8B.floor_ms(replace(case, capacity=8192), read_tbs=3.03) == SIZES_8B.floor_ms(case, read_tbs=3.03)


def test_cases():
    cases = decode_cases("8b", 32, batches=BATCHES, lengths=LENGTHS)
    assert len(set(cases)) == len(BATCHES) * len(LENGTHS) + 1
    roomy = [case for case in cases if case.capacity == 8192]
    assert [(case.batch, case.length, case.shape) for case in roomy] == [(1, 2048, "1 x 2048 in 8192 slots")]
    assert all(case.capacity >= case.length + 64 for case in cases)
    assert decode_cases("8b", 32, batches=[8], lengths=[2048])[-1].capacity == 2112
    assert {case.batch for case in prefill_cases("8b", 32, lengths=[512, 1024])} == {1}


def test_what_fits_on_80_gb():
    free = 62 * 10**9
    fitting = {
        (case.batch, case.length)
        for case in decode_cases("8b", 32, batches=BATCHES, lengths=LENGTHS)
        if why_too_large(SIZES_8B.cache_bytes(case), free) is None
    }
    assert {(8, 32768), (32, 8192)} <= fitting
    assert (32, 32768) not in fitting
    assert why_too_large(free - MARGIN_BYTES, free) is None
    assert why_too_large(free - MARGIN_BYTES + 1, free) is not None


def test_extra_memory():
    case = decode_cases("8b", 32, batches=[8], lengths=[32768])[0]
    cache = SIZES_8B.cache_bytes(case)
    extra = [item.extra_bytes(case, SIZES_8B) for item in IMPLEMENTATIONS]
    # A cache of its own; one layer copied out to all heads; nothing.
    assert extra == [cache, cache // 8, 0, 0, 0]


def test_twins_share_weights_and_nothing_else(models):
    assert is_patched(models.patched)
    assert not is_patched(models.plain)
    addresses = [[p.data_ptr() for p in model.parameters()] for model in (models.plain, models.patched)]
    assert addresses[0] == addresses[1]
    assert models.plain.config is not models.patched.config
    assert models.plain.model.layers[0] is not models.patched.model.layers[0]


@torch.no_grad()
def test_float32_model_converts_every_weight(models):
    tokens = torch.arange(6)[None]
    exact = logits_after(in_float32(models.plain), tokens, _empty_past(), num_logits=6)
    whole = random_model(TINY, torch.float32, torch.device("cpu"))
    whole.load_state_dict(models.plain.state_dict())
    torch.testing.assert_close(exact, whole(tokens).logits, rtol=1e-5, atol=1e-5)
    assert {parameter.dtype for parameter in models.plain.parameters()} == {torch.bfloat16}


@torch.no_grad()
def test_past_is_read_and_left_alone(models):
    tokens = torch.arange(10)[None]
    whole = logits_after(models.plain, tokens, _empty_past(), num_logits=4)
    cache = models.plain(tokens[:, :6], use_cache=True).past_key_values
    past = [(layer.keys, layer.values) for layer in cache.layers]
    before = [key.clone() for key, _ in past]
    torch.testing.assert_close(
        logits_after(models.plain, tokens[:, 6:], past, num_logits=4), whole, rtol=0.05, atol=0.1
    )
    assert all(torch.equal(key, old) for (key, _), old in zip(past, before, strict=True))


def _empty_past():
    return [(torch.zeros(1, 2, 0, 16, dtype=torch.bfloat16),) * 2 for _ in range(2)]


@pytest.mark.parametrize("case", [DECODE, PREFILL, replace(DECODE, batch=1)], ids=str)
def test_every_implementation_is_right(models, compiled, case):
    results = measure(case, models, IMPLEMENTATIONS)
    timed = {impl for impl, metric in values(results, case) if metric == "logits_rel_err"}
    expected = {item.name for item in IMPLEMENTATIONS if item.why_not(case) is None}
    assert timed == expected
    assert {(skip.impl, skip.reason) for skip in results.skips} == (
        {("flashcore_loop", "cannot run: its graph is one decode step")} if case.kind == "prefill" else set()
    )
    assert compiled == [{"mode": "reduce-overhead", "fullgraph": True}] * 2


@pytest.mark.parametrize("case", [DECODE, PREFILL, replace(DECODE, batch=1)], ids=str)
def test_each_is_compiled_once_and_as_one_graph(models, monkeypatch, case):
    """What is checked is what is timed: no tensor of a turn differs from those of the check in shape or strides."""
    compile_for_real, counters = torch.compile, []

    def compile_and_count(function, mode, fullgraph):
        counters.append(CompileCounter())
        return compile_for_real(function, backend=counters[-1], fullgraph=fullgraph)

    monkeypatch.setattr(torch, "compile", compile_and_count)
    results = measure(case, models, [HF_COMPILED, COMPILED])
    assert results.skips == []
    assert [counter.frame_count for counter in counters] == [1, 1]


def test_figures_of_a_decode_case(models, compiled):
    figures = values(measure(DECODE, models, [HF_EAGER, LOOP]), DECODE)
    assert figures["floor", "loop_ms"] == models.sizes.floor_ms(DECODE, read_tbs=3.0)
    # Two readings around a loop, one after each step.
    assert figures["hf_eager", "loop_ms"] == pytest.approx(5 / 3)
    assert figures["hf_eager", "loop_tokens"] == 3
    assert figures["flashcore_loop", "loop_ms"] == pytest.approx(5 / 8)
    assert figures["flashcore_loop", "loop_tokens"] == 8
    assert figures["flashcore_loop", "step_ms"] == pytest.approx(5)
    assert figures["flashcore_loop", "peak_gib"] == 3.0
    # The keys and values that others share are not its own.
    cache_gib = models.sizes.cache_bytes(DECODE) / 2**30
    assert figures["hf_eager", "peak_gib"] == pytest.approx(3.0 - cache_gib)


def test_figures_of_a_prefill_case(models):
    figures = values(measure(PREFILL, models, [HF_EAGER, EAGER]), PREFILL)
    assert figures["flashcore_eager", "prefill_ms"] == pytest.approx(5)
    assert ("floor", "loop_ms") not in figures


@torch.no_grad()
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=lambda item: item.name)
def test_decoding_feeds_greedy_tokens_back(models, compiled, implementation):
    """Token by token by hand, against the decoder's own loop over two different lengths."""
    cache = make_static_cache(models.patched, batch_size=3, max_cache_len=64)
    decoder = implementation.build(models, cache)
    for length in (20, 9):
        fill_randomly(cache)
        tokens, by_hand = torch.full((3, 1), 7), []
        decoder.set_length(length)
        for _ in range(4):
            by_hand.append(decoder.forward(tokens).clone())
            tokens = by_hand[-1].argmax(dim=-1, keepdim=True)
        fill_randomly(cache)
        decoder.set_length(length)
        start = decoder._step.tokens if implementation is FLASHCORE_LOOP else decoder._tokens
        start.fill_(7)
        decoder.decode(3)
        assert torch.equal(start, by_hand[2].argmax(dim=-1, keepdim=True))
        assert torch.equal(decoder.forward(start.clone()), by_hand[3])


@dataclass(frozen=True)
class Broken:
    """Hugging Face's eager model with its logits scaled, or a failure where it is told."""

    factor: float = 1.0
    fails_in: str = ""
    name: str = "flashcore_broken"
    is_eager: bool = True
    has_own_cache: bool = True

    def why_not(self, case):
        return None

    def extra_bytes(self, case, sizes):
        return 0

    def build(self, models, cache):
        decoder = HF_EAGER.build(models, cache)
        forward = decoder.forward
        decoder.forward = lambda tokens: forward(tokens) * self.factor

        def fail(*_):
            raise RuntimeError("first line\nsecond line")

        if self.fails_in:
            setattr(decoder, self.fails_in, fail)
        return decoder


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (Broken(factor=1.2), "wrong: logits are off by"),
        (Broken(factor=torch.nan), "wrong: logits are off by nan"),
        (Broken(fails_in="forward"), "failed: RuntimeError: first line"),
        (Broken(fails_in="decode"), "failed: RuntimeError: first line"),
    ],
    ids=lambda item: item if isinstance(item, str) else "",
)
def test_wrong_and_failing_implementations_have_no_times(models, broken, reason):
    results = measure(DECODE, models, [broken, HF_EAGER])
    figures = values(results, DECODE)
    assert ("hf_eager", "loop_ms") in figures
    assert (broken.name, "loop_ms") not in figures
    assert [skip.impl for skip in results.skips] == [broken.name]
    assert results.skips[0].reason.startswith(reason)
    assert is_failure(results.skips[0])


@torch.no_grad()
def test_check_sees_a_part_of_the_past_missing(models):
    """The bar is tight: five of twenty keys, in one of the sequences, move the logits past it."""
    cache = make_static_cache(models.patched, batch_size=3, max_cache_len=128)
    target = make_target(models, cache, DECODE)
    assert target.tokens.shape == (3, 4)
    assert target.exact.shape == (2, 4, 96)
    decoder = EAGER.build(models, cache)
    assert relative_error(logits_of(decoder, target), target.exact) <= target.bar
    fill_randomly(cache)
    for key, _ in layers_of(cache):
        key[2, :, :5] = 0
    assert relative_error(logits_of(decoder, target), target.exact) > 2 * target.bar


def test_what_does_not_fit_is_skipped(models):
    too_large = measure(DECODE, models, [HF_EAGER, EAGER], gauge=FakeGauge(free=MARGIN_BYTES))
    assert [row.impl for row in too_large.rows] == ["floor"]
    assert [skip.impl for skip in too_large.skips] == ["hf_eager", "flashcore_eager"]
    assert all(skip.reason.startswith("cannot run: needs 2.1 GB") for skip in too_large.skips)
    assert not is_failure(too_large.skips[1])


def test_a_case_that_fails_as_a_whole(models):
    results = measure(replace(DECODE, capacity=0), models, [EAGER])
    assert [skip.impl for skip in results.skips] == ["flashcore_eager"]
    assert results.skips[0].reason.startswith("failed: OptionError: max_cache_len")


META = {"gpu": "Some GPU", "torch": "1", "triton": "2", "transformers": "3", "commit": "abc", "date": "today"}


def written(path):
    return {
        (row["case"]["S"], row["impl"], row["metric"]): row["value"] for row in json.loads(path.read_text())["rows"]
    }


def test_runs_of_the_same_commit_are_merged(tmp_path):
    old, other = DECODE, replace(DECODE, length=99)
    rows = [Row(old, "a", "loop_ms", 1.0), Row(old, "a", "peak_gib", 1.0), Row(old, "b", "loop_ms", 2.0)]
    write_results(tmp_path, "llama", META, rows, [Skip(other, "a", "failed")])
    kept = read_mergeable(tmp_path, "llama", META | {"date": "tomorrow"})
    new = [Row(old, "a", "loop_ms", 5.0), Row(other, "a", "loop_ms", 6.0)]
    path = write_results(tmp_path, "llama", META, new, [], kept=kept)
    assert written(path) == {(24, "b", "loop_ms"): 2.0, (24, "a", "loop_ms"): 5.0, (99, "a", "loop_ms"): 6.0}
    assert json.loads(path.read_text())["skips"] == []


@pytest.mark.parametrize("name", ["gpu", "torch", "triton", "transformers", "commit"])
def test_runs_of_another_kind_are_not_merged(tmp_path, name):
    write_results(tmp_path, "llama", META, [Row(DECODE, "a", "loop_ms", 1.0)], [])
    assert read_mergeable(tmp_path, "llama", META) is not None
    assert read_mergeable(tmp_path, "llama", META | {name: "Some other"}) is None


@pytest.mark.parametrize("commit", [None, "abc-dirty"])
def test_runs_of_an_uncertain_commit_are_not_merged(tmp_path, commit):
    meta = META | {"commit": commit}
    write_results(tmp_path, "llama", meta, [Row(DECODE, "a", "loop_ms", 1.0)], [])
    assert read_mergeable(tmp_path, "llama", meta) is None


def test_merging_keeps_the_order_of_runs():
    def row(impl, value):
        return Row(DECODE, impl, "loop_ms", value).to_json()

    merged = merge({"rows": [row("a", 1), row("b", 2)], "skips": []}, {"rows": [row("a", 3)], "skips": []})
    assert [(item["impl"], item["value"]) for item in merged["rows"]] == [("b", 2), ("a", 3)]


def test_tables():
    figures = {("floor", "loop_ms"): 4.0, ("a", "loop_ms"): 5.0, ("a", "step_ms"): 6.0, ("a", "peak_gib"): 123.4}
    rows = [Row(DECODE, impl, metric, value) for (impl, metric), value in figures.items()]
    table = render_decode([DECODE], ["a", "absent"], rows)
    lines = list(zip(*(column.cells for column in table.columns), strict=True))
    assert lines == [
        ("3 x 24", "floor", "4.00", "1.00", "-", "-"),
        ("3 x 24", "a", "5.00", "1.25", "6.00", "123"),
    ]
    prefill = [Row(PREFILL, "a", "prefill_ms", 7.0)]
    table = render_columns("Prefill", [PREFILL], ["absent", "a"], prefill, metrics=["prefill_ms"])
    assert [column.header for column in table.columns] == ["B x S", "metric", "a"]
    assert [list(column.cells) for column in table.columns] == [["1 x 24"], ["prefill_ms"], ["7.00"]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--implementations", "hf_eager,fast"], "got 'fast'"),
        (["--lengths", "512,x"], "positive integers"),
        (["--batches", "0"], "positive integers"),
        (["--lengths", "", "--prefill-lengths", "", "--skip-compile-time"], "something to measure"),
    ],
)
def test_wrong_options(arguments, message):
    finished = CliRunner().invoke(_app(), arguments, env={"COLUMNS": "200"})
    assert finished.exit_code == 2
    assert message in finished.output


def _app():
    app = typer.Typer()
    app.command()(llama.main)
    return app


@pytest.mark.parametrize(("failing", "status"), [("hf_eager", 0), ("flashcore_eager", 1)])
def test_command(monkeypatch, tmp_path, models, failing, status):
    """The command around the measurements, which are made up, in two runs of one commit."""
    measured = []

    def measure_nothing(case, models, implementations, **options):
        measured.append((case.batch, case.length, case.capacity))
        assert options["effort"].rounds == 2
        timed = [item.name for item in implementations if item.name != failing]
        metric = "loop_ms" if case.kind == "decode" else "prefill_ms"
        rows = [Row(case, name, metric, 7.25) for name in timed]
        return Results(rows, [Skip(case, failing, "failed: [odd] text")])

    first_tokens = Results([Row(compile_case("tiny", 2), "flashcore_eager", "cold_ms", 1234.0)])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(name="Some GPU"))
    monkeypatch.setattr(llama, "CudaGauge", FakeGauge)
    monkeypatch.setattr(llama, "measure_ceilings", lambda repeats: CEILINGS)
    monkeypatch.setattr(llama, "make_models", lambda *_: models)
    monkeypatch.setattr(llama, "measure_case", measure_nothing)
    monkeypatch.setattr(llama, "measure_first_tokens", lambda *_, **__: first_tokens)
    common = ["--quick", "--output", str(tmp_path), "--commit", "abc", "--implementations", "hf_eager,flashcore_eager"]
    finished = CliRunner().invoke(_app(), common)
    assert finished.exit_code == status, finished.output
    assert measured == [(1, 512, 576), (1, 2048, 2112), (1, 2048, 8192), (1, 512, 576), (1, 2048, 2112)]
    assert (
        f"skipped {failing}, failed: [odd] text (decode 1 x 512, decode 1 x 2048, decode 1 x 2048 in" in finished.output
    )
    assert "7.25" in finished.output
    assert "1234" in finished.output
    path = tmp_path / "some-gpu" / "llama-quick.json"
    assert len(json.loads(path.read_text())["rows"]) == 6
    CliRunner().invoke(_app(), [*common, "--lengths", "64", "--prefill-lengths", "", "--skip-compile-time"])
    assert measured[5:] == [(1, 64, 128)]
    assert len(json.loads(path.read_text())["rows"]) == 7


def test_first_tokens_come_from_fresh_processes_with_fresh_caches(monkeypatch, tmp_path):
    runs = []

    def run(command, env, **_):
        runs.append((command[3:], env["TORCHINDUCTOR_CACHE_DIR"], env["TRITON_CACHE_DIR"]))
        if "flashcore_loop" in command:
            raise subprocess.CalledProcessError(1, command, stderr="Traceback\nRuntimeError: no\n")
        return SimpleNamespace(stdout=f"noise\n{1000.0 * len(runs)}\n")

    monkeypatch.setattr(fresh_process.subprocess, "run", run)
    case = compile_case("tiny", layers=2)
    results = first_token.measure_first_tokens([EAGER, COMPILED, LOOP], case, model=tmp_path, layers=2)
    assert [(row.metric, row.value) for row in results.rows] == [("cold_ms", 1000.0), ("warm_ms", 2000.0)]
    assert results.skips == [Skip(case, "flashcore_loop", "failed: RuntimeError: no")]
    assert [run[0][0] for run in runs] == ["flashcore_compiled", "flashcore_compiled", "flashcore_loop"]
    assert runs[0] == runs[1]
    assert runs[0][1:] != runs[2][1:]
    assert runs[0][0][1:] == ["--model", str(tmp_path), "--layers", "2"]


def test_first_token_is_timed_to_its_end(models, compiled):
    case = replace(compile_case("tiny", layers=2), length=30, capacity=64)
    gauge = FakeGauge()
    assert first_token.first_token_ms(COMPILED, models, case, gauge) == pytest.approx(5)
    assert len(gauge.readings) == 3


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["decode", pytest.param("prefill", marks=pytest.mark.slow)])
def test_a_case_on_the_gpu(kind):
    """Every implementation compiles and captures, and is right, on a small model."""
    config = LlamaConfig(**(TINY.to_dict() | {"hidden_size": 512, "head_dim": 128, "intermediate_size": 1024}))
    models = share("small", random_model(config, torch.bfloat16, torch.device("cuda")))
    case = LlamaCase(kind, "small", layers=2, batch=1, length=256, capacity=320)
    results = measure(case, models, IMPLEMENTATIONS, gauge=CudaGauge())
    timed = {row.impl for row in results.rows if row.metric == ("loop_ms" if kind == "decode" else "prefill_ms")}
    assert timed - {"floor"} == {item.name for item in IMPLEMENTATIONS if item.why_not(case) is None}
    assert all(0 < row.value < 10_000 for row in results.rows if row.metric.endswith("_ms"))


def test_names_are_unique():
    assert len({item.name for item in IMPLEMENTATIONS}) == len(IMPLEMENTATIONS) == 5
    assert all(isinstance(item, ModelForward) for item in IMPLEMENTATIONS[:4])
