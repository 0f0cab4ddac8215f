"""Whether the way from a camera to the surface that a warp shows there is known to be free.

A depth map says three things of a point in space: in front of the surface it is empty, behind it
is hidden, outside the picture nothing is known. A warp draws what its sources have seen, but in the
target a ray may first cross space that they never saw into, where the unseen side of an object may
stand: the warp then shows the wall behind it. Such pixels are not known, however sharp they look.
Cameras: OpenCV axes, pixel centres at +0.5, planar depth, ≤ 0 or not finite = unknown.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from see3d_jax.geometry.cameras import Camera, pixel_grid, relative_projection

Array = jax.Array
_END = 0.97  # of the way to the surface is looked at: nearer to it, depths are not that exact


def way_is_free(
    depth: Array, target: Camera, source_depths: Array, sources: Camera,
    samples: int = 48, tolerance: float = 0.01,
) -> Array:  # fmt: skip
    """Which pixels of T targets see their surface through nothing that is hidden from all sources.

    Args:
      depth: [T, H, W] planar depth of the targets' surfaces.
      target: batch [T].
      source_depths: [S, h, w] planar depth of the sources; sources: batch [S].
      samples: points tried on the way to the surface; what is thinner than the way between two of
        them may be missed.
      tolerance: relative depth by which a point must lie behind a source's surface to be hidden
        from it, or in front of it to be seen empty.

    A point is hidden when it is hidden from some source and none sees it empty. What no source has
    in its picture does not count as hidden: with a single photo, the space in front of nearly every
    other camera is such.

    Returns [T, H, W] bool, True where depth is unknown. Raises ValueError for shapes that do not
    fit.
    """
    size = (*target.intrinsics.shape[:-2], target.height, target.width)
    source_size = (*sources.intrinsics.shape[:-2], sources.height, sources.width)
    if len(size) != 3 or depth.shape != size:
        raise ValueError(f"way_is_free: expected depth {size} of targets [T], got {depth.shape}")
    if len(source_size) != 3 or source_depths.shape != source_size:
        raise ValueError(
            f"way_is_free: expected source depths {source_size} of sources [S], got "
            f"{source_depths.shape}"
        )
    return _way_is_free(depth, target, source_depths, sources, samples, tolerance)


@functools.partial(jax.jit, static_argnames=("samples", "tolerance"))
def _way_is_free(
    depth: Array, target: Camera, source_depths: Array, sources: Camera, samples: int,
    tolerance: float,
) -> Array:  # fmt: skip
    pixels = jnp.asarray(pixel_grid(target.height, target.width).reshape(-1, 2))
    fractions = (jnp.arange(samples) + 0.5) / samples * _END

    def one(inputs: tuple[Array, Array, Array]) -> Array:
        z, *pose = inputs
        camera = Camera(*pose, target.width, target.height)
        z = z.reshape(-1)
        known = jnp.isfinite(z) & (z > 0)
        z = jnp.where(known, z, 1.0)[:, None]

        def states(source: tuple[Array, Camera]) -> tuple[Array, Array]:
            surface, view = source
            a, b = relative_projection(camera, view)
            way = z * (pixels @ a[:, :2].T + a[:, 2])  # homogeneous source position, less b
            surface = surface.reshape(-1)

            def at(fraction: Array) -> tuple[Array, Array]:
                q = fraction * way + b
                ahead = q[:, 2] > 1e-6
                place = jnp.floor(q[:, :2] / jnp.where(ahead, q[:, 2], 1.0)[:, None])
                inside = (place >= 0).all(-1) & (place[:, 0] < view.width)
                inside &= ahead & (place[:, 1] < view.height)
                x, y = jnp.where(inside[:, None], place, 0.0).astype(jnp.int32).T
                there = surface[y * view.width + x]
                inside &= jnp.isfinite(there) & (there > 0)
                empty = q[:, 2] < there * (1 - tolerance)
                return inside & empty, inside & (q[:, 2] > there * (1 + tolerance))

            return jax.lax.map(at, fractions)

        # sources one after the other, so that memory does not grow with them
        nothing = jnp.zeros((samples, len(z)), bool)
        (empty, hidden), _ = jax.lax.scan(
            lambda sums, source: (jax.tree.map(jnp.logical_or, sums, states(source)), None),
            (nothing, nothing), (source_depths, sources),
        )  # fmt: skip
        return ~(hidden & ~empty).any(0) | ~known

    poses = jnp.asarray(target.intrinsics), jnp.asarray(target.world_to_camera)
    return jax.lax.map(one, (jnp.asarray(depth), *poses)).reshape(depth.shape)
