"""Which generated views are worth warping into the next targets: those that show what is missing.

Visibility is judged on small pictures, by a z-buffer of points: what matters is how much of the
targets a view makes known that the references, and the views chosen before it, do not.
"""

from __future__ import annotations

import cv2
import numpy as np

from see3d_jax.geometry.cameras import Camera
from see3d_jax.geometry.point_warping import warp_points
from see3d_jax.pipelines.warps import View, resize_depth

_SIDE = 64  # pixels, the longer side of the small targets
_DENSER = 2  # times as many source pixels per axis: no cracks up to this magnification
_WORTH = 0.005  # of the targets' pixels: less than that is not worth a warp


def choose_anchors(
    references: list[View], candidates: list[View], targets: Camera, most: int
) -> list[int]:
    """Indices of at most `most` candidates, greedily, the one that adds most first.

    Of candidates that add the same, the later one is taken. A candidate that adds less than 0.5 %
    of the targets' pixels is not chosen. `targets` is a batch [m].
    """
    covered = np.any([_visible(view, targets) for view in references], axis=0)
    known = [_visible(view, targets) for view in candidates]
    chosen: list[int] = []
    while len(chosen) < min(most, len(candidates)):
        gains = [(mask & ~covered).mean() for mask in known]
        best = max(range(len(gains)), key=lambda i: (gains[i], i))
        if gains[best] < _WORTH:
            break
        chosen.append(best)
        covered |= known[best]
    return chosen


def _visible(view: View, targets: Camera) -> np.ndarray:
    """[m, h, w] bool at the small size: which pixels of the targets the view reaches."""
    width, height = _small_size(targets.width, targets.height)
    fine = width * _DENSER, height * _DENSER
    image = cv2.resize(view.image, fine, interpolation=cv2.INTER_NEAREST)
    warped = warp_points(
        image, resize_depth(view.own_depth, *fine), view.camera.resized(*fine),
        targets.resized(width, height),
    )  # fmt: skip
    return np.asarray(warped.known)[..., 0] > 0


def _small_size(width: int, height: int) -> tuple[int, int]:
    """(width, height) with the longer side at most 64 pixels."""
    shrink = min(1.0, _SIDE / max(width, height))
    return max(1, round(width * shrink)), max(1, round(height * shrink))
