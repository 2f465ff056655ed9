"""A tiny model, its cases, and a clock that is made up."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import LlamaConfig

from bench.decoders import IMPLEMENTATIONS
from bench.harness import Ceilings
from bench.llama_cases import LlamaCase, ModelSizes
from bench.llama_runs import Effort, measure_case

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
EFFORT = Effort(rounds=2, tokens=8, steps=4)
EAGER_EFFORT = Effort(rounds=3, tokens=3, steps=2)
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


def measure(case, models, implementations, gauge=None):
    return measure_case(
        *(case, models, implementations),
        read_tbs=3.0,
        effort=EFFORT,
        eager_effort=EAGER_EFFORT,
        gauge=gauge or FakeGauge(),
    )


def values(results, case):
    return {(row.impl, row.metric): row.value for row in results.rows if row.case == case}
