"""Forward warping on the host: what input workers use to condition on posed clips.

The surfels of `geometry.warping` (see there for the equations) in NumPy, because an input worker
must not touch a device. Same surfels, z-buffer, occlusion edges and merge of several sources;
colours are interpolated by OpenCV without looking at surfaces, which differs beside occlusion edges
only. A test holds the two against each other. Cameras: OpenCV axes, pixel centres at +0.5, planar
depth; ≤ 0 or not finite = unknown.
"""

from __future__ import annotations

import dataclasses

import cv2
import numpy as np

# A pixel's half extent, and more than `geometry.warping` adds against cracks: depth maps are
# resized to the size of the views by picking pixels, which moves surfels by up to half a pixel.
_HALF = 0.55
_FOOTPRINT = 3  # target pixels tried per axis: surfaces stay closed up to magnification 2
_CENTRE = np.float32(0.5)
_EDGE = 0.03  # relative jump of inverse depth that is an occlusion edge
_CROSS = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))


@dataclasses.dataclass(frozen=True)
class PosedView:
    """A view with depth and camera.

    Attributes:
      image: [h, w, 3] uint8.
      depth: [h, w] float32.
      intrinsics: [3, 3] pixels.
      world_to_camera: [4, 4] rigid.
    """

    image: np.ndarray
    depth: np.ndarray
    intrinsics: np.ndarray
    world_to_camera: np.ndarray


class Warper:
    """Warps a set of source views into one target camera after another."""

    def __init__(self, sources: list[PosedView]) -> None:
        self._sources = [(view, _surfels(view.depth)) for view in sources]

    def __call__(
        self, intrinsics: np.ndarray, world_to_camera: np.ndarray, size: tuple[int, int]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Renders a target of `size` (h, w): image [h, w, 3] uint8, 0 in holes, and known [h, w].

        Where several sources know the same surface, the one that shows it largest is taken.
        """
        layers = [
            _warp(view, surfels, intrinsics, world_to_camera, size)
            for view, surfels in self._sources
        ]
        colour, depth, known, area = (np.stack(part) for part in zip(*layers))
        eligible = known & (depth <= depth.min(0) * np.float32(1.02))
        best = np.where(eligible, area, np.inf).argmin(0)[None]
        image = np.take_along_axis(colour, best[..., None], 0)[0]
        # Pixels beside a hole mix their colours with what the hole hides (see geometry.warping).
        known = cv2.erode(eligible.any(0).astype(np.uint8), _CROSS) > 0
        return np.where(known[..., None], image, 0).astype(np.uint8), known


def _surfels(depth: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Depth [h, w] → inverse depth (0 = unknown), its slope along x and y, occlusion edge."""
    valid = np.isfinite(depth) & (depth > 0)
    inverse = np.where(valid, 1 / np.where(valid, depth, 1), 0).astype(np.float32)
    slopes, edge = [], np.zeros_like(valid)
    for axis in (1, 0):
        step = np.diff(np.where(valid, inverse, np.nan), axis=axis)
        step = np.where(np.isnan(step), np.inf, step)
        ahead = np.insert(step, step.shape[axis], np.inf, axis)
        behind = np.insert(step, 0, np.inf, axis)
        # the smaller of the two steps stays on this pixel's surface at an edge
        slope = np.where(np.abs(ahead) < np.abs(behind), ahead, behind)
        slope = np.where(np.isfinite(slope), slope, 0)
        for one in (ahead, behind):
            edge |= np.isfinite(one) & (np.abs(one - slope) > _EDGE * inverse)
        slopes.append(slope.astype(np.float32))
    # a pixel that jumps on both sides (a thin thing) has no slope to trust
    steep = np.maximum(np.abs(slopes[0]), np.abs(slopes[1])) > 0.25 * inverse
    return inverse, *(np.where(steep, np.float32(0), slope) for slope in slopes), edge | steep


@dataclasses.dataclass(frozen=True)
class _Projection:
    """Surfels in homogeneous target coordinates: q and its derivatives along x and y, [3, n]."""

    q: np.ndarray
    along_x: np.ndarray
    along_y: np.ndarray

    def at(self, chosen: np.ndarray) -> _Projection:
        parts = (part.take(chosen, axis=1) for part in (self.q, self.along_x, self.along_y))
        return _Projection(*parts)

    def offset(self, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where in the source, relative to each surfel's pixel, target position (x, y) is seen."""
        m00 = self.along_x[0] - x * self.along_x[2]
        m01 = self.along_y[0] - x * self.along_y[2]
        m10 = self.along_x[1] - y * self.along_x[2]
        m11 = self.along_y[1] - y * self.along_y[2]
        r0, r1 = x * self.q[2] - self.q[0], y * self.q[2] - self.q[1]
        determinant = m00 * m11 - m01 * m10
        determinant[np.abs(determinant) < 1e-12] = 1e-12
        return (r0 * m11 - m01 * r1) / determinant, (m00 * r1 - r0 * m10) / determinant

    def stretch(self) -> np.ndarray:
        """How the target position moves with the source's: [2 (x, y), 2 (along x, along y), n]."""
        place = self.q[:2] / self.q[2]
        moves = [move[:2] - place * move[2] for move in (self.along_x, self.along_y)]
        return np.stack(moves, 1) / self.q[2]


def _project(
    view: PosedView,
    surfels: tuple[np.ndarray, ...],
    intrinsics: np.ndarray,
    world_to_camera: np.ndarray,
) -> _Projection:
    """All surfels [3, h·w] seen by the target camera."""
    inverse, slope_x, slope_y, _ = surfels
    source_pose = np.asarray(view.world_to_camera, np.float64)
    motion = np.asarray(world_to_camera, np.float64) @ np.linalg.inv(source_pose)
    k_target = np.asarray(intrinsics, np.float64)
    a = k_target @ motion[:3, :3] @ np.linalg.inv(np.asarray(view.intrinsics, np.float64))
    b = (k_target @ motion[:3, 3]).astype(np.float32)[:, None]
    height, width = inverse.shape
    across = a[:, :1] * (np.arange(width) + 0.5)  # [3, w]
    down = a[:, 1:2] * (np.arange(height) + 0.5) + a[:, 2:]  # [3, h]
    plane = (down[:, :, None] + across[:, None, :]).astype(np.float32).reshape(3, -1)
    a = a.astype(np.float32)
    return _Projection(
        plane + inverse.reshape(1, -1) * b,
        a[:, 0:1] + slope_x.reshape(1, -1) * b,
        a[:, 1:2] + slope_y.reshape(1, -1) * b,
    )


def _candidates(
    seen: _Projection, size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs of a surfel and a target pixel it may cover: surfels and the pixels' centres x, y.

    Solving for what a surfel covers is dear, so this leaves only the pixels near its parallelogram.
    """
    height, width = size
    x, y = seen.q[:2] / seen.q[2]
    extent_x, extent_y = np.abs(seen.stretch()).sum(1) * np.float32(1.1 * _HALF) + np.float32(0.01)
    first_x, first_y = (np.floor(c - np.float32((_FOOTPRINT - 1) / 2)) + _CENTRE for c in (x, y))
    pairs = []
    for row, column in np.ndindex(_FOOTPRINT, _FOOTPRINT):
        at_x, at_y = first_x + np.float32(column), first_y + np.float32(row)
        near = (np.abs(at_x - x) <= extent_x) & (np.abs(at_y - y) <= extent_y)
        near &= (at_x > 0) & (at_x < width) & (at_y > 0) & (at_y < height)
        chosen = np.flatnonzero(near)
        pairs.append((chosen, at_x[chosen], at_y[chosen]))
    return tuple(np.concatenate(part) for part in zip(*pairs))


def _warp(
    view: PosedView,
    surfels: tuple[np.ndarray, ...],
    intrinsics: np.ndarray,
    world_to_camera: np.ndarray,
    size: tuple[int, int],
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """One source → colour [h, w, 3], depth (infinity = nothing lands), known, magnification."""
    height, width = size
    inverse, slope_x, slope_y, edge = (part.reshape(-1) for part in surfels)
    seen = _project(view, surfels, intrinsics, world_to_camera)
    source = np.flatnonzero((inverse > 0) & (seen.q[2] > 1e-6))  # pixel of each surfel
    seen = seen.at(source)

    surfel, x, y = _candidates(seen, size)
    tried, source = seen.at(surfel), source[surfel]
    dx, dy = tried.offset(x, y)
    scale = tried.q[2] + tried.along_x[2] * dx + tried.along_y[2] * dy
    inverse_there = inverse[source] + slope_x[source] * dx + slope_y[source] * dy
    hit = (np.abs(dx) <= _HALF) & (np.abs(dy) <= _HALF) & (scale > 1e-6) & (inverse_there > 0)
    pixel = y.astype(np.int32) * width + x.astype(np.int32)
    depth = np.divide(scale, inverse_there, out=np.full_like(scale, np.inf), where=hit)

    nearest = np.full(height * width, np.inf, np.float32)
    np.minimum.at(nearest, pixel, depth)
    wins = np.flatnonzero(hit & (depth <= nearest[pixel]))
    pixel, source, dx, dy, surfel = (part[wins] for part in (pixel, source, dx, dy, surfel))

    maps = np.zeros((2, height * width), np.float32)
    maps[:, pixel] = source % view.depth.shape[1] + dx, source // view.depth.shape[1] + dy
    colour = cv2.remap(
        view.image, *maps.reshape(2, height, width), cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT
    )
    # The determinant of the stretch: target area of a source pixel, negative when seen from behind.
    stretch = seen.at(surfel).stretch()
    area = np.full(height * width, np.inf, np.float32)
    area[pixel] = stretch[0, 0] * stretch[1, 1] - stretch[0, 1] * stretch[1, 0]
    known = np.zeros(height * width, bool)
    known[pixel] = ~edge[source] & (area[pixel] > 0)
    return colour, nearest.reshape(size), known.reshape(size), area.reshape(size)
