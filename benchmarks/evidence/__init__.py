"""The paper's ablations at a scale that a laptop can rerun; see `python -m benchmarks.evidence`."""
