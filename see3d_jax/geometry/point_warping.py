"""Forward warps that treat pixels as points: a fast z-buffer and a soft, differentiable splat.

`geometry.warping` is the warp that pictures are made with: its surfels leave no cracks and land
at sub-pixel positions. These two are for where speed or gradients count more: every source pixel
lands on one target pixel (`warp_points`), or spreads over the four around it with a weight that
falls with depth (`splat_points`, whose output moves smoothly with depth, colour and camera).
Masks: 1 = known. Pixel centres at +0.5, planar depth, ≤ 0 or not finite = unknown.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from see3d_jax.geometry.cameras import Camera, relative_projection
from see3d_jax.geometry.warping import WarpedViews

Array = jax.Array
_NONE = np.uint32(2**32 - 1)


def warp_points(image: Array, depth: Array, source: Camera, target: Camera) -> WarpedViews:
    """One source into T targets, each pixel to the target pixel that holds it; the nearest wins.

    Args:
      image: [h, w, 3] colours; depth: [h, w]; source: one camera; target: batch [T].

    Depth and pixel number share one 32-bit key, so that a single scatter finds the winner: surfaces
    closer than about the view's depth range / 2^(32 - bits of h·w), in log depth, are not ordered.
    Raises ValueError for shapes that do not fit.
    """
    _check(image, depth, source, target)
    return _warp_points(image, depth, source, target)


def splat_points(
    image: Array, depth: Array, source: Camera, target: Camera, sharpness: float = 20.0
) -> WarpedViews:
    """One source into T targets by bilinear splats, weighted by exp(−sharpness · log depth).

    A point twice as far as another weighs 2^−sharpness of it, so near surfaces hide far ones as a
    smooth function of depth. `known` is the covered share of the pixel, 0 to 1. Arguments as in
    `warp_points`; gradients flow to image, depth and cameras.
    """
    _check(image, depth, source, target)
    return _splat_points(image, depth, source, target, sharpness)


def _check(image: Array, depth: Array, source: Camera, target: Camera) -> None:
    size = source.height, source.width
    if image.shape != (*size, 3) or depth.shape != size or source.intrinsics.ndim != 2:
        raise ValueError(
            f"expected an image {(*size, 3)} and depth {size} for one source camera, got "
            f"{image.shape} and {depth.shape}"
        )
    if target.intrinsics.ndim != 3:
        raise ValueError("target must be a batch [T] of cameras")


def _project(depth: Array, source: Camera, target: Camera) -> tuple[Array, Array, Array, Array]:
    """Every source pixel, flat over h·w: target x, y and depth, and whether it is in front.

    Coordinates come from a counter, not from a table, and q is finished before it is used: on a CPU
    that takes a quarter of the time.
    """
    a, b = relative_projection(source, target)
    number = jax.lax.iota(jnp.int32, depth.size)
    column = (number % source.width).astype(jnp.float32) + 0.5
    row = (number // source.width).astype(jnp.float32) + 0.5
    depth = depth.reshape(-1)
    valid = jnp.isfinite(depth) & (depth > 0)
    depth = jnp.where(valid, depth, 0.0)
    q = [depth * (a[i, 0] * column + a[i, 1] * row + a[i, 2]) + b[i] for i in range(3)]
    q = jax.lax.optimization_barrier(q)
    ahead = valid & (q[2] > 1e-6)
    z = jnp.where(ahead, q[2], 1.0)
    inverse = 1 / z
    return q[0] * inverse, q[1] * inverse, z, ahead


@jax.jit
def _warp_points(image: Array, depth: Array, source: Camera, target: Camera) -> WarpedViews:
    image, depth = jnp.asarray(image, jnp.float32), jnp.asarray(depth, jnp.float32)
    count, size = depth.size, target.height * target.width
    bits = max(1, (count - 1).bit_length())
    steps = 2 ** (32 - bits) - 2

    def one(pose: tuple[Array, Array]) -> tuple[Array, Array, Array]:
        camera = Camera(*pose, target.width, target.height)
        x, y, z, ahead = _project(depth, source, camera)
        inside = ahead & (x >= 0) & (x < camera.width) & (y >= 0) & (y < camera.height)
        x, y = (jnp.where(inside, part, 0.0).astype(jnp.int32) for part in (x, y))
        index = jnp.where(inside, y * camera.width + x, size)
        shown = jnp.where(inside, z, jnp.inf)
        near, far = shown.min(), jnp.where(jnp.isfinite(shown), shown, 0.0).max()
        near, far = jnp.minimum(near, far), jnp.maximum(far, 1e-9)
        # equal steps of inverse depth: as fine near the camera as disparities are
        rank = (1 / near - 1 / z) / jnp.maximum(1 / near - 1 / far, 1e-12) * steps
        key = jnp.clip(rank, 0, steps).astype(jnp.uint32) << bits
        key = key | jnp.arange(count, dtype=jnp.uint32)
        buffer = jnp.full(size + 1, _NONE, jnp.uint32)
        buffer = buffer.at[index].min(key, mode="promise_in_bounds")[:-1]
        known = buffer != _NONE
        winner = jnp.where(known, buffer & np.uint32(2**bits - 1), 0).astype(jnp.int32)
        colour = image.reshape(-1, 3).at[winner].get(mode="promise_in_bounds")
        z = z.at[winner].get(mode="promise_in_bounds")
        return jnp.where(known[:, None], colour, 0.0), jnp.where(known, z, 0.0), known

    poses = jnp.asarray(target.intrinsics), jnp.asarray(target.world_to_camera)
    colour, z, known = jax.lax.map(one, poses)
    return _views(colour, z, known, target)


@functools.partial(jax.jit, static_argnames=("sharpness",))
def _splat_points(
    image: Array, depth: Array, source: Camera, target: Camera, sharpness: float
) -> WarpedViews:
    image, depth = jnp.asarray(image, jnp.float32), jnp.asarray(depth, jnp.float32)
    size = target.height * target.width

    def one(pose: tuple[Array, Array]) -> tuple[Array, Array, Array]:
        camera = Camera(*pose, target.width, target.height)
        x, y, z, ahead = _project(depth, source, camera)
        x, y = x - 0.5, y - 0.5
        nearest = jax.lax.stop_gradient(jnp.where(ahead, z, jnp.inf).min())
        log = jnp.where(ahead, jnp.log(z / nearest), 0.0)
        weight = jnp.where(ahead, jnp.exp(-jnp.minimum(sharpness * log, 60.0)), 0.0)
        values = jnp.concatenate([image.reshape(-1, 3), z[:, None]], -1)
        rows = jnp.concatenate([values * weight[:, None], weight[:, None]], -1)
        sums, cover = jnp.zeros((size, 5)), jnp.zeros(size)
        left, top = jnp.floor(x), jnp.floor(y)
        for j in (0, 1):
            for i in (0, 1):
                column, row = left + i, top + j
                share = (1 - jnp.abs(x - column)) * (1 - jnp.abs(y - row)) * ahead
                inside = (column >= 0) & (column < camera.width)
                inside &= (row >= 0) & (row < camera.height)
                index = row * camera.width + column
                index = jnp.where(inside & ahead, index, size).astype(jnp.int32)
                sums = sums.at[index].add(rows * share[:, None], mode="drop")
                cover = cover.at[index].add(share, mode="drop")
        total = sums[:, 4:]
        mean = sums[:, :4] / jnp.where(total > 1e-30, total, 1.0)
        mean = jnp.where(total > 1e-30, mean, 0.0)
        return mean[:, :3], mean[:, 3], jnp.clip(cover, 0, 1)

    poses = jnp.asarray(target.intrinsics), jnp.asarray(target.world_to_camera)
    return _views(*jax.lax.map(one, poses), target)


def _views(colour: Array, depth: Array, known: Array, target: Camera) -> WarpedViews:
    size = target.height, target.width
    known = known.astype(jnp.float32).reshape(-1, *size, 1)
    return WarpedViews(colour.reshape(-1, *size, 3), depth.reshape(-1, *size), known)
