"""Benchmarks of the MLLM: one module a family turns its files into questions and references."""
