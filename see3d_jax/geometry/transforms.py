"""Rotations and quaternions: what camera files and camera paths need.

Quaternions are wxyz, unit length, [..., 4]; q and -q are the same rotation. Everything here is
NumPy in float64: paths and files are small and made once, and rounding would accumulate.
"""

from __future__ import annotations

import numpy as np


def quaternion_to_rotation(quaternion: np.ndarray) -> np.ndarray:
    """[..., 4] wxyz (any non-zero length) → [..., 3, 3] rotation matrix."""
    q = np.asarray(quaternion, np.float64)
    w, x, y, z = np.moveaxis(q / np.linalg.norm(q, axis=-1, keepdims=True), -1, 0)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return np.stack([np.stack(row, -1) for row in rows], -2)


def rotation_to_quaternion(rotation: np.ndarray) -> np.ndarray:
    """[..., 3, 3] rotation matrix → [..., 4] wxyz unit quaternion with w ≥ 0.

    The quaternion is the dominant eigenvector of a symmetric 4 × 4 matrix, which is well
    conditioned for every rotation and gives the nearest one for a slightly unclean matrix.
    """
    r = np.asarray(rotation, np.float64)
    xx, xy, xz = r[..., 0, 0], r[..., 0, 1], r[..., 0, 2]
    yx, yy, yz = r[..., 1, 0], r[..., 1, 1], r[..., 1, 2]
    zx, zy, zz = r[..., 2, 0], r[..., 2, 1], r[..., 2, 2]
    rows = [
        [xx + yy + zz, zy - yz, xz - zx, yx - xy],
        [zy - yz, xx - yy - zz, xy + yx, xz + zx],
        [xz - zx, xy + yx, yy - xx - zz, yz + zy],
        [yx - xy, xz + zx, yz + zy, zz - xx - yy],
    ]
    matrix = np.stack([np.stack(row, -1) for row in rows], -2)
    quaternion = np.linalg.eigh(matrix)[1][..., :, -1]
    return np.where(quaternion[..., :1] < 0, -quaternion, quaternion)


def slerp(start: np.ndarray, end: np.ndarray, weight: np.ndarray | float) -> np.ndarray:
    """Spherical interpolation along the shorter arc: [..., 4] × [..., 4] × [...] → [..., 4]."""
    start, end = (_normalised(np.asarray(q, np.float64)) for q in (start, end))
    weight = np.asarray(weight, np.float64)[..., None]
    cosine = np.sum(start * end, -1, keepdims=True)
    end = np.where(cosine < 0, -end, end)
    angle = np.arccos(np.clip(np.abs(cosine), 0.0, 1.0))
    sine = np.sin(angle)
    straight = sine < 1e-6  # the arc is a line here, and 0/0 otherwise
    safe = np.where(straight, 1.0, sine)
    first = np.where(straight, 1 - weight, np.sin((1 - weight) * angle) / safe)
    second = np.where(straight, weight, np.sin(weight * angle) / safe)
    return _normalised(first * start + second * end)


def nearest_rotation(matrix: np.ndarray) -> np.ndarray:
    """[..., 3, 3] → the rotation nearest to it (Frobenius norm)."""
    u, _, vt = np.linalg.svd(np.asarray(matrix, np.float64))
    sign = np.sign(np.linalg.det(u @ vt))
    u = np.concatenate([u[..., :, :2], u[..., :, 2:] * sign[..., None, None]], -1)
    return u @ vt


def _normalised(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector, axis=-1, keepdims=True)
