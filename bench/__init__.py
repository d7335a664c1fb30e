"""Benchmarks: plain scripts, run from the repository's root as `python -m bench.NAME`. Results: RESULTS.md."""
