"""Benchmarks: one command a claim, `python -m benchmarks.NAME`."""
