"""Benchmarks: `python -m benchmarks [name ...]`. They need torch, and triton on a GPU."""
