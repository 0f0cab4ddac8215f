"""A picture of where the cameras are: frusta of the given and the new views among scene points.

Drawn from above and from the side, without perspective, so that distances can be compared. "Up" is
the mean up axis (−y) of the cameras. Images are uint8 RGB.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from see3d_jax.geometry.cameras import Camera, pixel_grid, unproject
from see3d_jax.pipelines.warps import View

_SIDE = 640  # pixels of each of the two pictures
_POINTS = 20_000
_GIVEN, _NEW, _PATH = (200, 30, 30), (30, 90, 200), (120, 120, 120)
_PITCHES = 75.0, 15.0  # degrees that the two pictures look down
_TURN = 25.0  # degrees about the up axis, so that no axis is seen end on


def scene_points(views: Sequence[View]) -> tuple[np.ndarray, np.ndarray]:
    """World points [P, 3] of views with depth, evenly thinned out, and their colours [P, 3]."""
    points, colours = [], []
    for view in views:
        pixels = pixel_grid(view.camera.height, view.camera.width).reshape(-1, 2)
        known = np.flatnonzero(view.depth.reshape(-1) > 0)
        known = known[:: max(1, len(known) * len(views) // _POINTS)]
        points.append(unproject(view.camera, pixels[known], view.depth.reshape(-1)[known]))
        colours.append(view.image.reshape(-1, 3)[known])
    return np.concatenate(points), np.concatenate(colours)


def plot_cameras(
    references: Sequence[Camera], targets: Sequence[Camera], points: np.ndarray, colours: np.ndarray
) -> np.ndarray:
    """[640, 1280, 3]: seen from above and from the side; red = given views, blue = new ones.

    Points [P, 3] and colours [P, 3] uint8 may be empty.
    """
    poses = [
        np.linalg.inv([np.asarray(camera.world_to_camera, float) for camera in cameras])
        for cameras in (references, targets)
    ]
    centres = np.concatenate(poses)[:, :3, 3]
    shown = points
    if len(points):  # a few stray points must not shrink the rest
        low, high = np.percentile(points, (2, 98), axis=0)
        shown = points[((points >= low) & (points <= high)).all(1)]
    extent = np.concatenate([centres, shown])
    size = max(1e-6, float(np.linalg.norm(extent.max(0) - extent.min(0))))
    up = -np.concatenate(poses)[:, :3, 1].mean(0)
    ahead = np.concatenate(poses)[:, :3, 2].mean(0)
    pictures = [
        _draw(
            _view_axes(up, ahead, pitch), extent, points, colours,
            [(poses[1][:, :3, 3], None), (_frusta(references, poses[0], 0.06 * size), _GIVEN),
             (_frusta(targets, poses[1], 0.04 * size), _NEW)],
        )
        for pitch in _PITCHES
    ]  # fmt: skip
    return np.concatenate(pictures, 1)


def _frusta(cameras: Sequence[Camera], poses: np.ndarray, length: float) -> np.ndarray:
    """[N, 8, 2, 3]: the ends of the eight edges of each camera's pyramid, `length` high."""
    sizes = np.array([[camera.width, camera.height] for camera in cameras])
    corners = np.array([[0, 0], [1, 0], [1, 1], [0, 1]]) * sizes[:, None]
    corners = np.concatenate([corners, np.ones_like(corners[..., :1])], -1)
    lenses = np.linalg.inv([np.asarray(camera.intrinsics, float) for camera in cameras])
    rays = np.einsum("nij,nkj->nki", lenses, corners)
    tips = np.einsum("nij,nkj->nki", poses[:, :3, :3], rays * length) + poses[:, None, :3, 3]
    centres = np.broadcast_to(poses[:, None, :3, 3], tips.shape)
    sides = np.stack([centres, tips], 2)
    rim = np.stack([tips, np.roll(tips, -1, 1)], 2)
    return np.concatenate([sides, rim], 1)


def _view_axes(up: np.ndarray, ahead: np.ndarray, pitch: float) -> np.ndarray:
    """[3, 3] rows: right, down and into the picture, of an onlooker who looks down by `pitch`."""
    up = up / max(np.linalg.norm(up), 1e-9)
    level = ahead - up * (ahead @ up)
    if np.linalg.norm(level) < 1e-6:  # cameras that look straight up or down
        level = np.cross(up, [1.0, 0.3, 0.2])
    level /= np.linalg.norm(level)
    turn, pitch = np.radians(_TURN), np.radians(pitch)
    level = np.cos(turn) * level + np.sin(turn) * np.cross(up, level)
    into = np.cos(pitch) * level - np.sin(pitch) * up
    right = np.cross(level, up)
    return np.stack([right, np.cross(into, right), into])


def _draw(
    axes: np.ndarray, extent: np.ndarray, points: np.ndarray, colours: np.ndarray,
    lines: list[tuple[np.ndarray, tuple[int, int, int] | None]],
) -> np.ndarray:  # fmt: skip
    """One picture; lines are [N, E, 2, 3] edges with a colour, or a path [N, 3] without one."""
    flat = extent @ axes[:2].T
    low, high = flat.min(0), flat.max(0)
    scale = 0.88 * _SIDE / max((high - low).max(), 1e-9)
    offset = _SIDE / 2 - scale * (low + high) / 2

    def place(where: np.ndarray) -> np.ndarray:
        at = np.clip(scale * (where @ axes[:2].T) + offset, -_SIDE, 2 * _SIDE)
        return np.round(at).astype(np.int32)

    canvas = np.full((_SIDE, _SIDE, 3), 255, np.uint8)
    order = np.argsort(-(points @ axes[2]), kind="stable")
    x, y = place(points)[order].T
    inside = (x >= 0) & (x < _SIDE) & (y >= 0) & (y < _SIDE)
    paler = (128 + colours[order] // 2).astype(np.uint8)
    canvas[y[inside], x[inside]] = paler[inside]
    for ends, colour in lines:
        if colour is None:
            cv2.polylines(canvas, [place(ends)], False, _PATH, 1, cv2.LINE_AA)
            continue
        for start, end in place(ends).reshape(-1, 2, 2):
            cv2.line(canvas, start.tolist(), end.tolist(), colour, 1, cv2.LINE_AA)
    return canvas
