"""Benchmarks: `python -m benchmarks [name ...]`. They need no more than torch."""
