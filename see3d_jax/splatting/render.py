"""Gaussians + camera → picture: the three stages (project, bin, rasterise) in one call.

`render_within` is the pure, differentiable function for code under `jax.jit`: its capacity is
fixed, and the caller must check `pair_count`. `render` is for everyone else: it starts small and
doubles the capacity until everything fits, so that no Gaussian is ever dropped.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from see3d_jax.geometry.cameras import Camera
from see3d_jax.splatting.binning import bin_gaussians
from see3d_jax.splatting.gaussians import Gaussians
from see3d_jax.splatting.projection import project_gaussians
from see3d_jax.splatting.rasterize import rasterize


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rendering:
    """One picture.

    Attributes:
      rgb: [H, W, 3] in [0, ~1], over the background.
      depth: [H, W] sum of weight · planar z; divide by `alpha` for the mean depth of a pixel.
      alpha: [H, W] in [0, 1], how much of the pixel the Gaussians cover.
      pair_count: [] int32, (tile, Gaussian) pairs that were needed. If it exceeds the capacity
        the picture is meaningless and must be rendered again.
    """

    rgb: jax.Array
    depth: jax.Array
    alpha: jax.Array
    pair_count: jax.Array


def render_within(
    gaussians: Gaussians,
    camera: Camera,
    capacity: int,
    background: jax.Array | float = 0.0,
    near: float = 0.01,
) -> Rendering:
    """Renders with room for `capacity` pairs; differentiable in Gaussians, camera, background.

    Args:
      gaussians: the scene, N slots.
      camera: one camera (no batch dimension).
      capacity: static size of the pair list.
      background: [3] RGB or a grey value, seen where alpha < 1.
      near: Gaussians whose centre is nearer than this (scene units, planar z) are not drawn.
    """
    projected = project_gaussians(gaussians, camera, near)
    lists = bin_gaussians(projected, camera.width, camera.height, capacity)
    rows = [projected.means, projected.cholesky, projected.opacities[None], projected.colors]
    table = jnp.concatenate([*rows, projected.depths[None]]).T
    features, transmittance = rasterize(table, lists, camera.width, camera.height)
    return Rendering(
        rgb=features[..., :3] + transmittance[..., None] * background,
        depth=features[..., 3],
        alpha=1.0 - transmittance,
        pair_count=lists.pair_count,
    )


_render_jit = partial(jax.jit, static_argnums=(2,))(render_within)


def render(
    gaussians: Gaussians,
    camera: Camera,
    background: jax.Array | float = 0.0,
    near: float = 0.01,
    capacity: int = 1 << 15,
) -> Rendering:
    """Like `render_within`, but grows the capacity until every pair fits (not under jit)."""
    camera = Camera(
        jnp.asarray(camera.intrinsics, jnp.float32),
        jnp.asarray(camera.world_to_camera, jnp.float32),
        camera.width,
        camera.height,
    )
    background = jnp.broadcast_to(jnp.asarray(background, jnp.float32), 3)
    while True:
        picture = _render_jit(gaussians, camera, capacity, background, jnp.float32(near))
        needed = int(picture.pair_count)
        if needed <= capacity:
            return picture
        capacity = enough_capacity(needed)


def enough_capacity(pair_count: int | np.ndarray) -> int:
    """The power of two that holds `pair_count` pairs."""
    return 1 << max(10, int(pair_count - 1).bit_length())
