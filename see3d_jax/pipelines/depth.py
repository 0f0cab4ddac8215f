"""Depth of the given views, from wherever there is some: a model, files, else stereo between them.

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
from see3d_jax.pipelines.depth_model import DepthModel
from see3d_jax.pipelines.inputs import Scene, load_depth
from see3d_jax.pipelines.warps import View, resize_depth

STEREO_SIDE = 320  # pixels, the longer side that stereo works at
_FEW_POINTS = 50  # sparse points in a frame: fewer do not tell its range of depths
_ENOUGH = 0.02  # share of a view that must have depth to be of use


def reference_depths(
    scene: Scene, chosen: list[int], images: list[np.ndarray], cameras: list[Camera], max_size: int,
    model: DepthModel | None = None,
) -> tuple[list[np.ndarray], str]:  # fmt: skip
    """Depth of the chosen views at the size of `images`, and where it is from: "file", "stereo".

    Args:
      scene: where the views come from; chosen: which of its frames.
      images: uint8 [H, W, 3] and cameras of these frames, each of its own size.
      max_size: as given to `load_images`.
      model: asked instead of any of these; its depth is aligned to sparse points of the scene, else
        to stereo between the views, where there is either (then named, as in "model, aligned to
        stereo").

    Raises InputError when there is neither, or when the views do not overlap.
    """
    if model is not None:
        return _model_depths(scene, chosen, images, cameras, model)
    if scene.depth_paths is not None:
        return [load_depth(scene, i, max_size) for i in chosen], "file"
    if len(chosen) < 2:
        raise InputError(
            f"{scene.root}: has no depth maps; give --depth FILE, or two or more --reference "
            "frames that overlap, for stereo"
        )
    ranges = [point_range(scene, i) for i in chosen]
    found = np.stack(stereo(images, cameras, ranges))
    if (found > 0).mean() < _ENOUGH:
        raise InputError(
            f"{scene.root}: stereo found no common surface in the references "
            f"{', '.join(scene.names[i] for i in chosen)}; choose frames that overlap more, or "
            "give --depth FILE"
        )
    return _enlarged(found, cameras), "stereo"


def _model_depths(
    scene: Scene, chosen: list[int], images: list[np.ndarray], cameras: list[Camera],
    model: DepthModel,
) -> tuple[list[np.ndarray], str]:  # fmt: skip
    known = []
    for i, camera in zip(chosen, cameras, strict=True):
        pixels, depths = point_depths(scene, i)
        known.append((pixels * (camera.width / scene.cameras[i].width), depths))
    anchor = "sparse points"
    if min(len(depths) for _, depths in known) < _FEW_POINTS:
        known, anchor = [(None, None)] * len(chosen), "stereo"
        if len(chosen) > 1:
            found = _enlarged(stereo(images, cameras), cameras)
            known = [_samples(depth) for depth in found]
    results = [
        model.depth(image, camera, *where)
        for image, camera, where in zip(images, cameras, known, strict=True)
    ]
    for i, (depth, _) in zip(chosen, results, strict=True):
        if not depth.any():
            raise InputError(f"{model.path}: gives no positive depth for {scene.image_paths[i]}")
    aligned = all(done for _, done in results)
    return [depth for depth, _ in results], f"model, aligned to {anchor}" if aligned else "model"


def _samples(depth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Known pixels [K, 2] of a depth map, every one of them, and their depths [K]."""
    row, column = np.nonzero(depth)
    return np.stack([column, row], -1) + 0.5, depth[row, column]


def model_estimate(model: DepthModel, new: list[View], _: list[View]) -> np.ndarray:
    """The model's depth of the new views, without a common scale: [m, h, w] float32."""
    return np.stack([model.depth(view.image, view.camera)[0] for view in new])


def stereo_references(scene: Scene, first: int = 0) -> list[int]:
    """Frames to start from when none are named: the first, with two neighbours if stereo needs any.

    Neighbours look the first frame's way and stand closest to it.
    """
    if scene.depth_paths is not None:
        return [first]
    # only their poses count
    sources = choose_sources(stack([camera.resized(1, 1) for camera in scene.cameras]))[first]
    return [first, *sources[:2]]


def stereo_estimate(new: list[View], existing: list[View]) -> np.ndarray:
    """Stereo depth of the new views, from each other and the existing ones: [m, h, w] float32.

    In the units of the cameras; 0 where no other view confirms it, or none has another position.
    """
    views = [*new, *existing]
    found = stereo([view.image for view in views], [view.camera for view in views])[: len(new)]
    return np.stack(_enlarged(found, [view.camera for view in new]))


def point_range(scene: Scene, index: int) -> tuple[float, float] | None:
    """(nearest, farthest) depth of a frame by the sparse points seen in it, with a margin.

    None when fewer than 50 are.
    """
    depths = point_depths(scene, index)[1]
    if len(depths) < _FEW_POINTS:
        return None
    near, far = np.quantile(depths, [0.01, 0.99])
    return float(near / 1.4), float(far * 2)  # surfaces without points tend to lie behind


def point_depths(scene: Scene, index: int) -> tuple[np.ndarray, np.ndarray]:
    """Sparse points in front of a frame that saw them: pixels [K, 2] and planar depths [K]."""
    if scene.observations is None or scene.points is None:
        return np.zeros((0, 2), np.float32), np.zeros(0, np.float32)
    pixels, points = scene.observations[index]
    # In NumPy: XLA would compile anew for every frame's number of points.
    forward = np.asarray(scene.cameras[index].world_to_camera, np.float64)[2]
    depths = (scene.points[0][points] @ forward[:3] + forward[3]).astype(np.float32)
    return pixels[depths > 0], depths[depths > 0]


def _enlarged(depths: Sequence[np.ndarray], cameras: Sequence[Camera]) -> list[np.ndarray]:
    # Repeated pixels would make stairs of every slope, and a warp tears at each step.
    return [
        resize_depth(depth, camera.width, camera.height)
        for depth, camera in zip(depths, cameras, strict=True)
    ]


def stereo(
    images: list[np.ndarray],
    cameras: list[Camera],
    ranges: Sequence[tuple[float, float] | None] | None = None,
) -> list[np.ndarray]:
    """Depth of each of two or more views, all at one small size of their mean aspect ratio.

    Upright and lying photos both become squares: pixels need not be square to be matched, as long
    as the cameras follow.
    """
    aspect = float(np.exp(np.mean([np.log(camera.width / camera.height) for camera in cameras])))
    side = min(STEREO_SIDE, max(cameras[0].width, cameras[0].height))
    small = max(1, round(side * min(1, aspect))), max(1, round(side / max(1, aspect)))
    pictures = [cv2.resize(image, small, interpolation=cv2.INTER_AREA) for image in images]
    posed = stack([camera.resized(*small) for camera in cameras])
    return list(stereo_depth(np.stack(pictures) / np.float32(255), posed, ranges=ranges))
