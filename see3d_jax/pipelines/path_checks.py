"""What is odd about a path or its depth, in words: for the report, the run file and the console.

None of it stops a run. A path through a wall gives views of the wall's inside, a view that nothing
reaches is made up by the model alone, and unknown depth becomes holes; who looks at the result
should be told.
"""

from __future__ import annotations

import numpy as np

from see3d_jax.geometry.cameras import Camera
from see3d_jax.pipelines.warps import View

_MARGIN = 0.02  # relative depth: nearer to a surface than that, its depth is not to be trusted
_MUCH = 0.1  # share of a reference without depth that is worth a word


def path_warnings(
    references: list[View], names: list[str], targets: Camera, masks: np.ndarray
) -> list[str]:
    """One sentence for each thing that is odd, each naming the views or references it is about.

    `masks` [N, h, w] are the known pixels of the targets [N], as they were warped.
    """
    found = []
    for name, view in zip(names, references, strict=True):
        unknown = 1 - float((view.depth > 0).mean())
        if unknown > _MUCH:
            found.append(
                f"reference {name}: {unknown:.0%} of its pixels have no depth (0, negative, NaN or "
                "infinite); they are not warped"
            )
    inside = behind_surfaces(references, targets)
    if inside:
        found.append(
            f"views {number_ranges(inside)}: the camera stands behind a surface that a reference "
            "shows (a path through a wall?)"
        )
    empty = np.flatnonzero(~masks.any((1, 2))).tolist()
    if empty:
        found.append(
            f"views {number_ranges(empty)}: nothing that is given or made before is visible (the "
            "warp is all hole); the model makes them up"
        )
    return found


def behind_surfaces(references: list[View], targets: Camera) -> list[int]:
    """Indices of the targets whose centre is hidden from a reference and seen empty by none."""
    centres = np.linalg.inv(np.asarray(targets.world_to_camera, np.float64))[:, :3, 3]
    hidden, empty = np.zeros((2, len(centres)), bool)
    for view in references:
        pose = np.asarray(view.camera.world_to_camera, np.float64)
        at = centres @ pose[:3, :3].T + pose[:3, 3]
        q = at @ np.asarray(view.camera.intrinsics, np.float64).T
        ahead = at[:, 2] > 1e-6
        x, y = np.floor(q[:, :2] / np.where(ahead, q[:, 2], 1.0)[:, None]).T
        inside = ahead & (x >= 0) & (x < view.camera.width) & (y >= 0) & (y < view.camera.height)
        row, column = (np.where(inside, part, 0).astype(int) for part in (y, x))
        surface = view.depth[row, column]
        inside &= surface > 0
        hidden |= inside & (at[:, 2] > surface * (1 + _MARGIN))
        empty |= inside & (at[:, 2] < surface * (1 - _MARGIN))
    return np.flatnonzero(hidden & ~empty).tolist()


def number_ranges(numbers: list[int]) -> str:
    """Sorted numbers in words.

    >>> number_ranges([1, 2, 3, 7])
    '1-3, 7'
    """
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(f"{p[0]}-{p[-1]}" if len(p) > 1 else str(p[0]) for p in parts)
