"""Camera paths for novel views: named moves around a first view, interpolation, and files.

A move starts from one camera and is scaled by `focus`, the distance to what that camera looks at
(`focus_distance` takes it from the depth map), so that the same numbers work in a doll's house and
in a valley. "Up" is the first camera's own up (its −y axis). Every path is a batched `Camera` with
the first camera's intrinsics and size; OpenCV axes, world→camera.
"""

from __future__ import annotations

import csv
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from see3d_jax.errors import InputError
from see3d_jax.geometry.cameras import Camera, intrinsics_matrix, stack
from see3d_jax.geometry.colmap_files import find_colmap_model, read_colmap
from see3d_jax.geometry.scene_files import read_transforms
from see3d_jax.geometry.transforms import (
    quaternion_to_rotation,
    rotation_to_quaternion,
    slerp,
)


def focus_distance(depth: np.ndarray) -> float:
    """Distance at which moves pivot: the median known depth of the middle of the view.

    `depth` is [H, W] planar depth, 0 = unknown. Raises InputError when no pixel is known.
    """
    depth = np.asarray(depth)
    height, width = depth.shape
    middle = depth[height // 4 : height - height // 4, width // 4 : width - width // 4]
    for part in (middle, depth):
        known = part[np.isfinite(part) & (part > 0)]
        if known.size:
            return float(np.median(known))
    raise InputError("depth: no pixel has a known depth, so a camera path cannot be scaled")


def orbit(first: Camera, focus: float, views: int, degrees: float = 40.0) -> Camera:
    """Around the point `focus` ahead of the first camera, always looking at it.

    Below 360° the path swings from −degrees/2 to +degrees/2, so that it stays as near to the first
    view as it can; a full turn starts at the first view and stops one step before it.
    """
    if abs(degrees) >= 360:
        angles = np.linspace(0, degrees, views, endpoint=False)
    else:
        angles = np.linspace(-degrees / 2, degrees / 2, views)
    pivot = np.array([0.0, 0.0, focus])
    poses = []
    for angle in np.radians(angles):
        rotation = _turn_about_y(angle)
        poses.append(_pose(rotation, pivot - rotation @ pivot))
    return _moved(first, poses)


def spiral(
    first: Camera, focus: float, views: int, radius: float = 0.15, turns: float = 2.0,
    travel: float = 0.15,
) -> Camera:  # fmt: skip
    """Circles in the image plane while moving in and out, looking at the pivot.

    `radius` and `travel` (forward and back) are fractions of `focus`. The path starts and ends at
    the first view: the radius swells from 0 and back, so it also loops.
    """
    poses = []
    for s in np.linspace(0, 1, views):
        swell = np.sin(np.pi * s)
        angle = 2 * np.pi * turns * s
        offset = focus * np.array(
            [
                radius * swell * np.cos(angle),
                radius * swell * np.sin(angle),
                travel * np.sin(2 * np.pi * s),
            ]
        )
        poses.append(_looking(offset, np.array([0.0, 0.0, focus])))
    return _moved(first, poses)


def forward(first: Camera, focus: float, views: int, travel: float = 0.4) -> Camera:
    """Straight ahead by `travel` × focus from the first view; negative moves back."""
    return _moved(
        first,
        [_pose(np.eye(3), [0, 0, travel * focus * s]) for s in np.linspace(0, 1, views)],
    )


def dolly_zoom(first: Camera, focus: float, views: int, travel: float = 0.4) -> Camera:
    """Forward by `travel` × focus while zooming out, so that what is at `focus` keeps its size.

    `travel` must be less than 1; negative moves back and zooms in.
    """
    if not travel < 1:
        raise InputError(f"trajectory dolly_zoom: travel must be less than 1, got {travel}")
    path = forward(first, focus, views, travel)
    zoom = np.ones((views, 3, 3), np.float32)
    left = (1 - travel * np.linspace(0, 1, views)).astype(np.float32)  # of the distance
    zoom[:, 0, 0] = zoom[:, 1, 1] = left
    return dataclasses.replace(path, intrinsics=path.intrinsics * zoom)


def lemniscate(first: Camera, focus: float, views: int, radius: float = 0.2) -> Camera:
    """A figure of eight in the image plane, `radius` × focus to either side, facing the pivot.

    It starts at the first view and passes it again half way; the last view is one step before it.
    """
    poses = []
    for angle in np.linspace(0, 2 * np.pi, views, endpoint=False):
        offset = radius * focus * np.array([np.sin(angle), 0.5 * np.sin(2 * angle), 0.0])
        poses.append(_looking(offset, np.array([0.0, 0.0, focus])))
    return _moved(first, poses)


def look_around(first: Camera, views: int, degrees: float = 40.0) -> Camera:
    """Turns in place from −degrees/2 to +degrees/2 about the camera's own up axis."""
    angles = np.radians(np.linspace(-degrees / 2, degrees / 2, views))
    return _moved(first, [_pose(_turn_about_y(angle), np.zeros(3)) for angle in angles])


def interpolate(keys: Camera, views: int) -> Camera:
    """A smooth path through a batch of K ≥ 2 cameras, first and last included.

    Positions follow a Catmull-Rom curve, rotations turn along the shortest arcs, intrinsics change
    linearly. The key cameras themselves are met exactly where a view falls on them.
    """
    to_world = np.linalg.inv(np.asarray(keys.world_to_camera, np.float64))
    count = len(to_world)
    if count < 2:
        raise ValueError(f"interpolate: needs at least 2 cameras, got {count}")
    positions = to_world[:, :3, 3]
    # phantom neighbours make the end segments as straight as the data says
    padded = np.concatenate(
        [2 * positions[:1] - positions[1:2], positions, 2 * positions[-1:] - positions[-2:-1]]
    )
    quaternions = rotation_to_quaternion(to_world[:, :3, :3])
    intrinsics = np.asarray(keys.intrinsics, np.float64)
    poses, matrices = [], []
    for u in np.linspace(0, count - 1, views):
        i = min(int(u), count - 2)
        f = u - i
        p0, p1, p2, p3 = padded[i : i + 4]
        position = 0.5 * (
            2 * p1
            + (p2 - p0) * f
            + (2 * p0 - 5 * p1 + 4 * p2 - p3) * f**2
            + (3 * p1 - p0 - 3 * p2 + p3) * f**3
        )
        rotation = quaternion_to_rotation(slerp(quaternions[i], quaternions[i + 1], f))
        poses.append(np.linalg.inv(_pose(rotation, position)))
        matrices.append((1 - f) * intrinsics[i] + f * intrinsics[i + 1])
    return Camera(
        np.stack(matrices).astype(np.float32),
        np.stack(poses).astype(np.float32),
        keys.width,
        keys.height,
    )


def from_file(path: str | os.PathLike[str], like: Camera) -> Camera:
    """Cameras of a transforms.json, a COLMAP model folder, or a CSV, at the size of `like`.

    A CSV has a header with x, y, z, qw, qx, qy, qz (camera centre and camera→world rotation, OpenCV
    axes) and optionally fx, fy, cx, cy in pixels of `like`, whose intrinsics are used otherwise.
    Raises InputError naming the file.
    """
    path = Path(path)
    if path.suffix.lower() == ".csv":
        return _from_csv(path, like)
    if path.is_dir():
        model = find_colmap_model(path)
        if (path / "transforms.json").is_file():
            cameras = read_transforms(path / "transforms.json").cameras
        elif model is not None:
            cameras = read_colmap(model).cameras
        else:
            raise InputError(f"{path}: holds neither transforms.json nor a COLMAP model")
    elif path.suffix.lower() == ".json":
        cameras = read_transforms(path).cameras
    else:
        raise InputError(f"{path}: a camera path is a .json, a .csv or a COLMAP folder")
    return stack([camera.resized(like.width, like.height) for camera in cameras])


MOVES = {
    "orbit": orbit,
    "spiral": spiral,
    "forward": forward,
    "dolly_zoom": dolly_zoom,
    "lemniscate": lemniscate,
    # turning in place has no use for a distance, but every move is called alike
    "look_around": lambda first, focus, views, **options: look_around(first, views, **options),
}


def make_trajectory(name: str, first: Camera, focus: float, views: int, **options: float) -> Camera:
    """The path called `name` (one of MOVES), or the cameras of the file of that name.

    `options` are the keyword arguments of the move, e.g. degrees=60. Raises InputError for an
    unknown name or option, or a bad file.
    """
    if name in MOVES:
        if views < 1:
            raise InputError(f"trajectory {name}: views must be at least 1, got {views}")
        try:
            return MOVES[name](first, focus, views, **options)
        except TypeError as error:
            raise InputError(f"trajectory {name}: unknown option ({error})") from error
    if os.path.exists(name):
        return from_file(name, first)
    raise InputError(f"trajectory {name}: neither one of {', '.join(MOVES)} nor an existing file")


def _from_csv(path: Path, like: Camera) -> Camera:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file, skipinitialspace=True))
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read as CSV ({error})") from error
    if not rows:
        raise InputError(f"{path}: holds no camera")
    cameras = []
    for number, row in enumerate(rows, start=2):  # line 1 is the header
        where = f"{path}: line {number}"
        x, y, z, *quaternion = (
            _cell(row, k, where) for k in ("x", "y", "z", "qw", "qx", "qy", "qz")
        )
        if not np.linalg.norm(quaternion) > 1e-6:
            raise InputError(f"{where}: the quaternion is zero")
        to_world = _pose(quaternion_to_rotation(np.array(quaternion)), [x, y, z])
        intrinsics = np.asarray(like.intrinsics)
        if "fx" in row:
            intrinsics = intrinsics_matrix(
                *(_cell(row, k, where) for k in ("fx", "fy", "cx", "cy"))
            )
        cameras.append(
            dataclasses.replace(
                like,
                intrinsics=intrinsics,
                world_to_camera=np.linalg.inv(to_world).astype(np.float32),
            )
        )
    return stack(cameras)


def _cell(row: dict[str, str | None], key: str, where: str) -> float:
    try:
        value = float(row[key])
    except (KeyError, TypeError, ValueError):
        raise InputError(f"{where}: {key} must be a number, got {row.get(key)!r}") from None
    if not np.isfinite(value):
        raise InputError(f"{where}: {key} must be finite, got {value}")
    return value


def _moved(first: Camera, poses: Sequence[np.ndarray]) -> Camera:
    """Poses given as camera→(first camera's frame) become cameras in the world."""
    base = np.asarray(first.world_to_camera, np.float64)
    if base.shape != (4, 4):
        raise ValueError(f"trajectory: expected one camera to start from, got {base.shape}")
    matrices = np.stack([np.linalg.inv(pose) @ base for pose in poses]).astype(np.float32)
    intrinsics = np.broadcast_to(np.asarray(first.intrinsics, np.float32), (len(matrices), 3, 3))
    return Camera(intrinsics.copy(), matrices, first.width, first.height)


def _pose(rotation: np.ndarray, position: Sequence[float]) -> np.ndarray:
    pose = np.eye(4)
    pose[:3, :3], pose[:3, 3] = rotation, position
    return pose


def _turn_about_y(angle: float) -> np.ndarray:
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]])


def _looking(position: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Camera→frame pose at `position` looking at `target`, with the frame's −y as up."""
    ahead = (target - position) / np.linalg.norm(target - position)
    right = np.cross(np.array([0.0, 1.0, 0.0]), ahead)
    right /= np.linalg.norm(right)
    return _pose(np.stack([right, np.cross(ahead, right), ahead], -1), position)
