"""Depth of the given views, from wherever there is some: their files, else stereo between them.

Stereo needs no weights but at least two posed views that overlap. It works on small pictures, since
its time and memory grow with the cube of the side, and leaves unknown what no other view confirms.
Depth is planar z in scene units, float32 [H, W], 0 = unknown.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from see3d_jax.errors import InputError
from see3d_jax.geometry.cameras import Camera, stack
from see3d_jax.geometry.multiview import choose_sources, stereo_depth
from see3d_jax.pipelines.inputs import Scene, load_depth
from see3d_jax.pipelines.warps import View

STEREO_SIDE = 320  # pixels, the longer side that stereo works at
_ENOUGH = 0.02  # share of a view that must have depth to be of use


def reference_depths(
    scene: Scene, chosen: list[int], images: list[np.ndarray], cameras: list[Camera], max_size: int
) -> tuple[list[np.ndarray], str]:
    """Depth of the chosen views at the size of `images`, and where it is from: "file", "stereo".

    Args:
      scene: where the views come from; chosen: which of its frames.
      images: uint8 [H, W, 3] and cameras of these frames, all of one size.
      max_size: as given to `load_images`.

    Raises InputError when there is neither, or when the views do not overlap.
    """
    if scene.depth_paths is not None:
        return [load_depth(scene, i, max_size) for i in chosen], "file"
    if len(chosen) < 2:
        raise InputError(
            f"{scene.root}: has no depth maps; give --depth FILE, or two or more --reference "
            "frames that overlap, for stereo"
        )
    height, width = images[0].shape[:2]
    found = np.stack(_stereo(images, cameras))
    if (found > 0).mean() < _ENOUGH:
        raise InputError(
            f"{scene.root}: stereo found no common surface in the references "
            f"{', '.join(scene.names[i] for i in chosen)}; choose frames that overlap more, or "
            "give --depth FILE"
        )
    return _enlarged(found, height, width), "stereo"


def stereo_references(scene: Scene) -> list[int]:
    """Frames to start from when none are named: the first, with two neighbours if stereo needs any.

    Neighbours share the first frame's size and direction of view and stand closest to it.
    """
    first = scene.cameras[0]
    same = [
        i for i, c in enumerate(scene.cameras) if (c.width, c.height) == (first.width, first.height)
    ]
    if scene.depth_paths is not None or len(same) < 2:
        return [0]
    sources = choose_sources(stack([scene.cameras[i] for i in same]))[0]
    return [0, *(same[i] for i in sources[:2])]


def stereo_estimate(new: list[View], existing: list[View]) -> np.ndarray:
    """Stereo depth of the new views, from each other and the existing ones: [m, h, w] float32.

    In the units of the cameras; 0 where no other view confirms it, or none has another position.
    """
    views = [*new, *existing]
    found = _stereo([view.image for view in views], [view.camera for view in views])[: len(new)]
    height, width = new[0].depth.shape
    return np.stack(_enlarged(found, height, width))


def _enlarged(depths: Sequence[np.ndarray], height: int, width: int) -> list[np.ndarray]:
    return [cv2.resize(d, (width, height), interpolation=cv2.INTER_NEAREST) for d in depths]


def _stereo(images: list[np.ndarray], cameras: list[Camera]) -> list[np.ndarray]:
    """Depth of each of two or more views of one aspect ratio, all at one small size."""
    height, width = images[0].shape[:2]
    shrink = min(1.0, STEREO_SIDE / max(height, width))
    small = max(1, round(width * shrink)), max(1, round(height * shrink))
    pictures = [cv2.resize(image, small, interpolation=cv2.INTER_AREA) for image in images]
    posed = stack([camera.resized(*small) for camera in cameras])
    return list(stereo_depth(np.stack(pictures) / np.float32(255), posed))
