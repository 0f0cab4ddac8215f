"""A flight past cameras, for a video of the scene that they show."""

from __future__ import annotations

from collections import Counter

import numpy as np

from see3d_jax.geometry.cameras import Camera
from see3d_jax.geometry.transforms import nearest_rotation


def camera_path(cameras: list[Camera], frames: int) -> list[Camera]:
    """A smooth flight past the given cameras, at even speed, from one end to the other."""
    matrices = np.stack([np.asarray(c.world_to_camera, np.float64) for c in cameras])
    rotations = matrices[:, :3, :3]
    positions = -np.einsum("nji,nj->ni", rotations, matrices[:, :3, 3])
    order = _chain(positions)
    positions, rotations = positions[order], rotations[order]
    along = np.concatenate([[0.0], np.cumsum(np.linalg.norm(np.diff(positions, axis=0), axis=1))])
    along = along + np.linspace(0.0, 1e-6 + 1e-3 * along[-1], len(along))  # strictly rising
    samples = np.linspace(0.0, along[-1], frames)
    # Each frame is a mean of the cameras around it; the width spans about two of them.
    width = 1.2 * along[-1] / max(1, len(cameras) - 1)
    weight = np.exp(-0.5 * ((samples[:, None] - along) / width) ** 2)
    weight /= weight.sum(1, keepdims=True)
    centre = weight @ positions
    rotation = nearest_rotation(np.einsum("fn,nij->fij", weight, rotations))
    path = np.tile(np.eye(4), (frames, 1, 1))
    path[:, :3, :3] = rotation
    path[:, :3, 3] = -np.einsum("fij,fj->fi", rotation, centre)
    # The sharpest lens of those that are held as most are, upright or lying.
    held = Counter(camera.width > camera.height for camera in cameras)
    lens = max(cameras, key=lambda c: (held[c.width > c.height], c.width * c.height))
    return [Camera(lens.intrinsics, m.astype(np.float32), lens.width, lens.height) for m in path]


def _chain(positions: np.ndarray) -> list[int]:
    """Order in which each camera is followed by the nearest one left, from an outermost camera."""
    distance = np.linalg.norm(positions[:, None] - positions[None], axis=-1)
    chain = [int(distance.sum(1).argmax())]
    left = set(range(len(positions))) - set(chain)
    while left:
        chain.append(min(left, key=lambda i: (distance[chain[-1], i], i)))
        left.remove(chain[-1])
    return chain
