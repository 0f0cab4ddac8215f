"""Pinhole cameras.

Conventions, the same everywhere in this project:
- OpenCV axes: x right, y down, z forward; world→camera matrices; metres where a scale is known.
- Pixel centres at +0.5: the top-left pixel covers [0, 1)², its centre is (0.5, 0.5).
- Depth is planar z in camera space, not distance along the ray.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array | np.ndarray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Camera:
    """One camera, or a batch of cameras of one image size.

    Attributes:
      intrinsics: [..., 3, 3] float32, pixels; [[fx, 0, cx], [0, fy, cy], [0, 0, 1]].
      world_to_camera: [..., 4, 4] float32 rigid transform, OpenCV axes.
      width, height: image size in pixels (static: part of the jit cache key).
    """

    intrinsics: Array
    world_to_camera: Array
    width: int = dataclasses.field(metadata={"static": True})
    height: int = dataclasses.field(metadata={"static": True})

    def __getitem__(self, index: Any) -> Camera:
        """Indexes the batch dimensions."""
        return Camera(self.intrinsics[index], self.world_to_camera[index], self.width, self.height)

    @property
    def camera_to_world(self) -> jax.Array:
        """[..., 4, 4] inverse of `world_to_camera` (rigid inverse, no matrix inversion)."""
        return rigid_inverse(self.world_to_camera)

    @property
    def position(self) -> jax.Array:
        """[..., 3] camera centre in world coordinates."""
        return self.camera_to_world[..., :3, 3]

    def resized(self, width: int, height: int) -> Camera:
        """The same camera rendering to another image size (pixel centres at +0.5 stay exact)."""
        scale = np.array([width / self.width, height / self.height, 1.0], np.float32)
        return Camera(self.intrinsics * scale[:, None], self.world_to_camera, width, height)

    def window(self, left: float, top: float, width: int, height: int) -> Camera:
        """The same camera with another part of its image plane, in pixels from its top-left corner.

        The part may reach beyond the image: (0, 0) and a larger size add pixels on the right and
        at the bottom.
        """
        shift = np.array([[0, 0, left], [0, 0, top], [0, 0, 0]], np.float32)
        return Camera(self.intrinsics - shift, self.world_to_camera, width, height)


def intrinsics_matrix(fx: float, fy: float, cx: float, cy: float) -> np.ndarray:
    """[3, 3] float32 pinhole matrix in pixels."""
    return np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]], np.float32)


def stack(cameras: list[Camera]) -> Camera:
    """Stacks cameras of one image size into a batch [N, ...]."""
    sizes = {(camera.width, camera.height) for camera in cameras}
    if len(sizes) != 1:
        raise ValueError(f"cameras: expected one image size to stack, got {sorted(sizes)}")
    ((width, height),) = sizes
    return Camera(
        np.stack([np.asarray(c.intrinsics, np.float32) for c in cameras]),
        np.stack([np.asarray(c.world_to_camera, np.float32) for c in cameras]),
        width,
        height,
    )


def rigid_inverse(transform: Array) -> jax.Array:
    """[..., 4, 4] → [..., 4, 4]: inverse of a rotation + translation."""
    rotation = jnp.swapaxes(transform[..., :3, :3], -1, -2)
    translation = -jnp.einsum(
        "...ij,...j->...i", rotation, transform[..., :3, 3], precision="highest"
    )
    top = jnp.concatenate([rotation, translation[..., None]], -1)
    bottom = jnp.broadcast_to(jnp.array([0.0, 0.0, 0.0, 1.0], top.dtype), (*top.shape[:-2], 1, 4))
    return jnp.concatenate([top, bottom], -2)


def look_at(eye: Array, target: Array, up: Array = (0.0, -1.0, 0.0)) -> np.ndarray:
    """World→camera [4, 4] float32 of a camera at `eye` looking at `target`.

    `up` is the world direction that appears upward in the image; the default says the world's y
    axis points down, as in the camera of the first view.
    """
    eye, target, up = (np.asarray(v, np.float64) for v in (eye, target, up))
    forward = target - eye
    forward /= np.linalg.norm(forward)
    right = np.cross(forward, up)
    norm = np.linalg.norm(right)
    if norm < 1e-9:
        raise ValueError("look_at: the viewing direction is parallel to `up`; give another up")
    right /= norm
    down = np.cross(forward, right)
    rotation = np.stack([right, down, forward])
    matrix = np.eye(4)
    matrix[:3, :3] = rotation
    matrix[:3, 3] = -rotation @ eye
    return matrix.astype(np.float32)


def project(camera: Camera, points: Array) -> tuple[jax.Array, jax.Array]:
    """World points [..., N, 3] → pixels [..., N, 2] and depth [..., N] (planar z; < 0 = behind)."""
    rotation, translation = camera.world_to_camera[..., :3, :3], camera.world_to_camera[..., :3, 3]
    in_camera = (
        jnp.einsum("...ij,...nj->...ni", rotation, points, precision="highest")
        + translation[..., None, :]
    )
    depth = in_camera[..., 2]
    homogeneous = jnp.einsum(
        "...ij,...nj->...ni", camera.intrinsics, in_camera, precision="highest"
    )
    safe = jnp.where(jnp.abs(depth) < 1e-8, 1e-8, depth)
    return homogeneous[..., :2] / safe[..., None], depth


def unproject(camera: Camera, pixels: Array, depth: Array) -> jax.Array:
    """Pixels [..., N, 2] and planar depth [..., N] → world points [..., N, 3]."""
    focal = jnp.stack([camera.intrinsics[..., 0, 0], camera.intrinsics[..., 1, 1]], -1)
    centre = camera.intrinsics[..., :2, 2]
    xy = (pixels - centre[..., None, :]) / focal[..., None, :] * depth[..., None]
    in_camera = jnp.concatenate([xy, depth[..., None]], -1)
    to_world = rigid_inverse(camera.world_to_camera)
    return (
        jnp.einsum("...ij,...nj->...ni", to_world[..., :3, :3], in_camera, precision="highest")
        + to_world[..., None, :3, 3]
    )


def relative_projection(source: Camera, target: Camera) -> tuple[jax.Array, jax.Array]:
    """A [3, 3], b [3]: source pixel (x, y) of depth z is seen at target A·(x, y, 1) + b / z.

    Single cameras; the target pixel is homogeneous, its third component target over source depth.
    """
    matmul = functools.partial(jnp.matmul, precision="highest")
    motion = matmul(target.world_to_camera, rigid_inverse(source.world_to_camera))
    k = source.intrinsics
    fx, fy, cx, cy = k[0, 0], k[1, 1], k[0, 2], k[1, 2]
    zero, one = jnp.zeros_like(fx), jnp.ones_like(fx)
    k_inverse = jnp.stack([
        jnp.stack([1 / fx, zero, -cx / fx]),
        jnp.stack([zero, 1 / fy, -cy / fy]),
        jnp.stack([zero, zero, one]),
    ])  # fmt: skip
    a = matmul(matmul(target.intrinsics, motion[:3, :3]), k_inverse)
    return a, matmul(target.intrinsics, motion[:3, 3])


def pixel_grid(height: int, width: int) -> np.ndarray:
    """[height, width, 2] float32 (x, y) of pixel centres."""
    x, y = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    return np.stack([x, y], -1).astype(np.float32)
