"""Benchmarks of FlashCore beside its peers: `python -m bench.attention`, `python -m bench.llama`.

All implementations of a case run in one process on the same tensors. Each is checked against a reference of higher
precision before it is timed, and a wrong result is never timed. Results go to `bench/results/<gpu>/<bench>.json`.
"""
