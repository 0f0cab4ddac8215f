"""Means over scenes with bootstrap confidence intervals.

A benchmark's number is the mean over its scenes of the mean over a scene's views, so that scenes
count the same however many views they have. Its interval says how far it would move with other
scenes and views of the same kind: scenes are drawn anew with replacement, then views within each of
them, 2000 times; the interval holds the middle 95 %. With a single scene only views are drawn, and
with a single view there is no interval.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

DRAWS = 2000
LEVEL = 0.95


def summary(scenes: Sequence[Sequence[float | None]], seed: int = 0) -> dict[str, float | int]:
    """Mean and interval of per-view values, one sequence per scene; None = no value.

    Returns {"mean", "low", "high", "scenes", "views"}; only counts where there is no value, and no
    interval where there is a single one.
    """
    known = [np.array([v for v in scene if v is not None], float) for scene in scenes]
    known = [values for values in known if len(values)]
    counts = {"scenes": len(known), "views": sum(map(len, known))}
    if not known:
        return counts
    result = {"mean": round(float(np.mean([values.mean() for values in known])), 4), **counts}
    if counts["views"] > 1:
        low, high = np.quantile(_draws(known, seed), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        result |= {"low": round(float(low), 4), "high": round(float(high), 4)}
    return result


def difference(
    ours: Sequence[Sequence[float | None]], theirs: Sequence[Sequence[float | None]]
) -> dict[str, float | int]:
    """`summary` of ours − theirs view by view: what both share (hard scenes) drops out."""
    return summary([
        [None if a is None or b is None else a - b for a, b in zip(one, other, strict=True)]
        for one, other in zip(ours, theirs, strict=True)
    ])  # fmt: skip


def _draws(known: list[np.ndarray], seed: int) -> np.ndarray:
    """[DRAWS] means of scenes and views drawn with replacement."""
    rng = np.random.default_rng(seed)
    # Views of each scene first, for all draws at once; then which scenes each draw has.
    means = np.stack([
        values[rng.integers(0, len(values), (DRAWS, len(values)))].mean(1) for values in known
    ])  # fmt: skip
    if len(known) == 1:
        return means[0]
    chosen = rng.integers(0, len(known), (DRAWS, len(known)))
    # Drawn twice in one draw, a scene would have the same views twice; shift to another draw's.
    shift = rng.integers(0, DRAWS, chosen.shape)
    return means[chosen, shift].mean(1)
