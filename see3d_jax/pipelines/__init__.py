"""Whole tasks, from files to results: `generate` is also reachable as `pipelines.generate`."""

from __future__ import annotations

from typing import Any

__all__ = ["generate"]


def __getattr__(name: str) -> Any:
    """Imports the pipeline on first use: other modules of this package need none of its weight."""
    if name == "generate":
        from see3d_jax.pipelines.generation import generate

        return generate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
