"""The tables of README.md are those of the results files."""

from __future__ import annotations

import doctest
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from bench import readme
from bench.case_groups import WINDOWED, decode, prefill
from bench.harness import Ceilings
from bench.llama_cases import LlamaCase, compile_case, prefill_cases
from bench.results import DIRECTORY, Case, Row, make_meta, write_results
from tests.snapshots import assert_expected_inline

CEILINGS = Ceilings(copy_tbs=3.0, read_tbs=3.0, matmul_tflops=700.0, graph_kernel_us=1.25)
META = make_meta("Some GPU", CEILINGS, commit="0123456789abcdef") | {
    "torch": "2.11.0",
    "triton": "3.6.0",
    "transformers": None,
    "date": "2026-11-23T01:07:16+00:00",
}


def llama_case(batch: int, length: int, capacity: int) -> LlamaCase:
    return LlamaCase("decode", "8b", layers=32, batch=batch, length=length, capacity=capacity)


def rows_of(case: Case, metric: str, **values: float) -> list[Row]:
    return [Row(case, impl, metric, value) for impl, value in values.items()]


def test_examples() -> None:
    failed, attempted = doctest.testmod(readme)
    assert failed == 0
    assert attempted > 0


def test_the_readme_is_up_to_date() -> None:
    text = readme.README.read_text()
    assert text == readme.update(text, DIRECTORY), "run `python -m bench.readme`"


def test_tables(tmp_path: Path) -> None:
    rows = rows_of(llama_case(8, 2048, 2112), "loop_ms", floor=5.5, flashcore_loop=6.0)
    rows += rows_of(llama_case(1, 2048, 8192), "loop_ms", floor=5.0, flashcore_loop=5.5, hf_eager=100.0)
    rows += rows_of(llama_case(1, 2048, 2112), "loop_ms", floor=5.0, flashcore_loop=5.25, hf_eager=96.0)
    rows += rows_of(llama_case(1, 2048, 2112), "step_ms", flashcore_loop=6.0)
    rows += rows_of(prefill_cases("8b", 32, [512])[0], "prefill_ms", flashcore_compiled=20.0, hf_compiled=19.5)
    rows += rows_of(compile_case("8b", 32), "warm_ms", flashcore_loop=900.0)
    rows += rows_of(compile_case("8b", 32), "cold_ms", flashcore_loop=9000.0)
    write_results(tmp_path, "llama", META, rows, [])
    rows = rows_of(decode(1, 512), "us", floor=0.7, flashcore=7.9, sdpa_cudnn=8.2, unknown=1.0)
    rows += rows_of(prefill(16384), "tflops", flashcore=500.0, sdpa_cudnn=600.0)
    rows += rows_of(prefill(512), "tflops", flashcore=380.0, sdpa_cudnn=370.0)
    # Of another group than the tables'.
    rows += [row for case in WINDOWED if case.window for row in rows_of(case, "tflops", flashcore=1.0, flex=2.0)]
    write_results(tmp_path, "attention", META, rows, [])
    (tmp_path / "some-gpu" / "attention-quick.json").write_text("not read")
    assert_expected_inline(
        readme.render(tmp_path),
        """\
Some GPU, reads 3.00 TB/s, multiplies 700 TFLOP/s; torch 2.11.0, triton 3.6.0; commit 0123456789ab, 2026-11-23

**Decode of a whole model, ms a token, and times the floor** (batch x length; 8b, 32 layers)

| | floor | FlashCore's loop | Hugging Face, eager |
|---|---:|---:|---:|
| 1 x 2048 | 5.00 | **5.25** (1.05x) | 96.0 (19.20x) |
| 1 x 2048 in 8192 slots | 5.00 | **5.50** (1.10x) | 100 (20.00x) |
| 8 x 2048 | 5.50 | 6.00 (1.09x) | - |

**One decode step that the host waits for, ms** (batch x length; 8b, 32 layers)

| | FlashCore's loop |
|---|---:|
| 1 x 2048 | 6.00 |

**Prefill of a whole model, ms** (batch x length; 8b, 32 layers)

| | FlashCore, compiled | Hugging Face, compiled |
|---|---:|---:|
| 1 x 512 | 20.0 | **19.5** |

**From a loaded model to its first decoded token, ms** (batch x length; 8b, 32 layers)

| | FlashCore's loop |
|---|---:|
| 1 x 2048, compilers' caches empty | 9000 |
| 1 x 2048, compilers' caches filled | 900 |

Some GPU, reads 3.00 TB/s, multiplies 700 TFLOP/s; torch 2.11.0, triton 3.6.0; commit 0123456789ab, 2026-11-23

**Decode attention, us** (batch x length; 32 query and 8 KV heads, D = 128, bfloat16)

| | floor | FlashCore | SDPA cuDNN |
|---|---:|---:|---:|
| 1 x 512 | 0.70 | **7.90** | 8.20 |

**Causal prefill attention, TFLOP/s** (batch x length; 32 query and 8 KV heads, D = 128, bfloat16)

| | FlashCore | SDPA cuDNN |
|---|---:|---:|
| 32 x 512 | **380** | 370 |
| 1 x 16384 | 500 | **600** |

**Causal prefill attention, 16k tokens in all**

<picture>
<source media="(prefers-color-scheme: dark)" srcset="bench/results/some-gpu/plots/attention-prefill-dark.svg">
<img alt="Causal prefill attention, 16k tokens in all" src="bench/results/some-gpu/plots/attention-prefill-light.svg">
</picture>""",
    )


def test_no_results(tmp_path: Path) -> None:
    assert readme.render(tmp_path) == ""
    (tmp_path / "gpu").mkdir()
    assert readme.render(tmp_path) == ""


def test_markers_are_needed() -> None:
    with pytest.raises(ValueError, match="results:begin"):
        readme.replace_part("no markers", "results", "new")
    with pytest.raises(ValueError, match="results:end"):
        readme.replace_part("<!-- results:end --> <!-- results:begin -->", "results", "new")
