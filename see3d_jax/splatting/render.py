"""Gaussians + camera → picture: the three stages (project, bin, rasterise) in one call.

`render_within` is the pure, differentiable function for code under `jax.jit`: its capacity is
fixed, and the caller must check `pair_count`. `render` is for everyone else: it starts small and
raises the capacity until everything fits, so that no Gaussian is ever dropped.

With a mesh of several devices (`processor.host_mesh`) each draws a band of the image.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from see3d_jax.geometry.cameras import Camera
from see3d_jax.splatting.binning import TILE, band_rows, bin_gaussians, tile_grid
from see3d_jax.splatting.gaussians import Gaussians
from see3d_jax.splatting.processor import BAND, COMPILER_OPTIONS
from see3d_jax.splatting.projection import (
    Projected,
    normals_towards_camera,
    project_gaussians,
)
from see3d_jax.splatting.rasterize import rasterize


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rendering:
    """One picture.

    Attributes:
      rgb: [H, W, 3] in [0, ~1], over the background.
      depth: [H, W] sum of weight · planar z; divide by `alpha` for the mean depth of a pixel.
      alpha: [H, W] in [0, 1], how much of the pixel the Gaussians cover.
      normals: [H, W, 3] sum of weight · unit normal towards the camera (camera axes), or None when
        not asked for; normalise for the direction.
      pair_count: [] int32, (tile, Gaussian) pairs that were needed (by the fullest band).
        If it exceeds the capacity the picture is meaningless and must be rendered again.
    """

    rgb: jax.Array
    depth: jax.Array
    alpha: jax.Array
    pair_count: jax.Array
    normals: jax.Array | None = None


def render_within(
    gaussians: Gaussians,
    camera: Camera,
    capacity: int,
    background: jax.Array | float = 0.0,
    near: float = 0.01,
    mesh: Mesh | None = None,
    antialiased: bool = False,
    with_normals: bool = False,
    generous: bool = False,
) -> Rendering:
    """Renders with room for `capacity` pairs; differentiable in Gaussians, camera, background.

    Args:
      gaussians: the scene, N slots.
      camera: one camera (no batch dimension).
      capacity: static size of the pair list.
      background: [3] RGB or a grey value, seen where alpha < 1.
      near: Gaussians whose centre is nearer than this (scene units, planar z) are not drawn.
      mesh: from `processor.host_mesh`: one band of the image per device, `capacity` pairs for each.
      antialiased: small Gaussians keep their light (see `projection`); static.
      with_normals: draw `normals` too, from the shortest axes of the Gaussians; static.
      generous: the capacity is far more than will be needed (see `binning`); static.
    """
    # The barriers keep XLA from computing projection and colours anew for every pair, inside the
    # gathers of the next stages (an eighth of the time of forward + backward on CPU).
    projected = jax.lax.optimization_barrier(
        project_gaussians(gaussians, camera, near, antialiased)
    )
    rows = [projected.means, projected.cholesky, projected.opacities[None], projected.colors]
    rows += [projected.depths[None]]
    if with_normals:
        rows += [normals_towards_camera(gaussians, camera)]
    table = jax.lax.optimization_barrier(jnp.concatenate(rows).T)
    bands = 1 if mesh is None else mesh.size
    draw = partial(_draw_band, (camera.width, camera.height), capacity, bands, generous)
    if mesh is not None:
        whole, split = PartitionSpec(), PartitionSpec(BAND)
        draw = jax.shard_map(
            draw, mesh=mesh, in_specs=(whole, whole, split), out_specs=split, check_vma=False
        )
    outputs, transmittance, pair_count = draw(
        jax.lax.stop_gradient(projected), table, jnp.arange(bands, dtype=jnp.int32)
    )
    tiles = jnp.concatenate([outputs, transmittance[:, :, None]], 2)
    if mesh is not None:
        tiles = jax.lax.with_sharding_constraint(tiles, NamedSharding(mesh, PartitionSpec()))
    image = _assemble(tiles, camera.width, camera.height)
    transmittance = image[..., -1]
    return Rendering(
        rgb=image[..., :3] + transmittance[..., None] * background,
        depth=image[..., 3],
        alpha=1.0 - transmittance,
        pair_count=pair_count.max(),
        normals=image[..., 4:7] if with_normals else None,
    )


def _draw_band(
    size: tuple[int, int],
    capacity: int,
    bands: int,
    generous: bool,
    projected: Projected,
    table: jax.Array,
    band: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Band [1] of an image of `size` → tiles [1, T, C, 64] and [1, T, 64], pairs needed [1]."""
    lists = bin_gaussians(projected, *size, capacity, band[0], bands, generous)
    outputs, transmittance = rasterize(table, lists, band[0], tile_grid(*size)[0], bands)
    return outputs[None], transmittance[None], lists.pair_count[None]


def _assemble(tiles: jax.Array, width: int, height: int) -> jax.Array:
    """[bands, T, C, 64] → [H, W, C]."""
    bands, across, rows = tiles.shape[0], tile_grid(width, height)[0], band_rows(height, len(tiles))
    image = tiles.reshape(bands, rows, across, -1, TILE, TILE).transpose(1, 0, 4, 2, 5, 3)
    return image.reshape(rows * bands * TILE, across * TILE, -1)[:height, :width]


_render_jit = jax.jit(
    render_within,
    static_argnames=("capacity", "antialiased", "with_normals"),
    compiler_options=COMPILER_OPTIONS,
)


def render(
    gaussians: Gaussians,
    camera: Camera,
    background: jax.Array | float = 0.0,
    near: float = 0.01,
    capacity: int = 1 << 15,
    antialiased: bool = False,
    with_normals: bool = False,
) -> Rendering:
    """Like `render_within`, but raises the capacity until every pair fits (not under jit)."""
    camera = Camera(
        jnp.asarray(camera.intrinsics, jnp.float32),
        jnp.asarray(camera.world_to_camera, jnp.float32),
        camera.width,
        camera.height,
    )
    background = jnp.broadcast_to(jnp.asarray(background, jnp.float32), 3)
    while True:
        picture = _render_jit(
            gaussians, camera, capacity, background, jnp.float32(near),
            antialiased=antialiased, with_normals=with_normals,
        )  # fmt: skip
        needed = int(picture.pair_count)
        if needed <= capacity:
            return picture
        capacity = enough_capacity(needed)


def enough_capacity(pair_count: int | np.ndarray) -> int:
    """A capacity for `pair_count` pairs: at least 1024, at most an eighth more than needed.

    Few different values, as each is compiled anew; sorting the unused rest costs time as well.
    """
    step = 1 << max(7, int(pair_count - 1).bit_length() - 4)
    return max(1024, -(-int(pair_count) // step) * step)
