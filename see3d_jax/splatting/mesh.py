"""Depth maps → one coloured triangle mesh: TSDF fusion (Curless & Levoy 1996) + marching cubes.

A box of voxels keeps, for every voxel, the weighted mean of its signed distance to the surfaces
that the cameras see, in units of the truncation distance: +1 in front, −1 behind. Where the mean
crosses 0 is the surface. Voxels that no camera has seen stay open, so the mesh has an edge there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from see3d_jax.geometry.cameras import Camera, pixel_grid, unproject
from see3d_jax.splatting.gaussians import Gaussians
from see3d_jax.splatting.render import render

TRUNCATION = 4.0  # voxels
FREE_WEIGHT = 0.3  # of a view that looks through a voxel, against one that sees a surface there
# Less covered pixels have no depth (dark surfaces are often fitted half transparent); nor have
# those on a depth edge, where the mean depth of a pixel lies between two surfaces.
MIN_ALPHA = 0.3
MAX_STEP = 0.05  # relative depth step to a neighbour
# Pieces with less than this share of all faces are floaters.
MIN_PIECE = 0.005


@dataclasses.dataclass(frozen=True)
class Mesh:
    """V vertices, F triangles.

    Attributes:
      vertices: [V, 3] float32, world coordinates.
      faces: [F, 3] int32, counter-clockwise as seen from the cameras.
      colors: [V, 3] uint8 RGB.
    """

    vertices: np.ndarray
    faces: np.ndarray
    colors: np.ndarray


def mesh_of_gaussians(
    gaussians: Gaussians, cameras: Sequence[Camera], resolution: int, near: float = 0.01
) -> Mesh | None:
    """Renders the scene's depth from its cameras and fuses it; None where there is no surface.

    `resolution` is as of `fuse`.
    """
    depths, images = [], []
    for camera in cameras:
        picture = jax.tree.map(np.asarray, render(gaussians, camera, near=near, capacity=1 << 17))
        covered = np.maximum(picture.alpha, 1e-6)
        depth = np.where(picture.alpha > MIN_ALPHA, picture.depth / covered, 0.0)
        depths.append(_without_edges(depth))
        images.append(np.clip(picture.rgb, 0, 1))
    return fuse(depths, images, cameras, resolution)


def fuse(
    depths: Sequence[np.ndarray],
    images: Sequence[np.ndarray],
    cameras: Sequence[Camera],
    resolution: int,
) -> Mesh | None:
    """Fuses depth maps into a mesh.

    Args:
      depths: per camera [H, W] planar z, 0 = unknown.
      images: per camera [H, W, 3] RGB in [0, 1].
      cameras: unbatched, of the maps' sizes.
      resolution: voxels along the longest side of the box around all surfaces. Memory is at most
        40 · resolution³ bytes.

    Returns the mesh without its smallest loose pieces, or None where no surface was seen.
    """
    from skimage.measure import marching_cubes

    box = _bounds(depths, cameras)
    if box is None:
        return None
    voxel = float((box[1] - box[0]).max() / resolution)
    shape = tuple(int(n) for n in np.ceil((box[1] - box[0]) / voxel) + 1)
    # Sums of: weight, weighted distance, weight of the colour, R, G, B.
    volume = jnp.zeros((6, *shape), jnp.float32)
    origin = jnp.asarray(box[0], jnp.float32)
    for depth, image, camera in zip(depths, images, cameras, strict=True):
        maps = np.concatenate([depth[..., None], image], -1).astype(np.float32)
        camera = jax.tree.map(jnp.asarray, camera)
        volume = _add_view(volume, jnp.asarray(maps), camera, origin, voxel)
    weight, distance, colored, *color = np.asarray(volume)
    seen = weight > 0
    distance = np.where(seen, distance / np.maximum(weight, 1e-6), 1.0)
    # A cell, named by its last corner, counts when all its eight corners were seen.
    for axis in range(3):
        seen = seen & np.roll(seen, 1, axis)
    seen[0] = seen[:, 0] = seen[:, :, 0] = False
    if not seen.any() or not distance.min() < 0 < distance.max():
        return None
    try:
        vertices, faces, _, _ = marching_cubes(
            distance, 0.0, mask=seen, gradient_direction="descent", allow_degenerate=False
        )
    except (ValueError, RuntimeError):  # no cell holds a surface
        return None
    vertices, faces = _without_crumbs(vertices, faces)
    if not len(faces):
        return None
    colors = _sample(color, colored, vertices)
    return Mesh(
        (box[0] + voxel * vertices).astype(np.float32),
        faces.astype(np.int32),
        np.clip(np.rint(255 * colors), 0, 255).astype(np.uint8),
    )


@partial(jax.jit, donate_argnums=0)
def _add_view(
    volume: jax.Array, maps: jax.Array, camera: Camera, origin: jax.Array, voxel: jax.Array
) -> jax.Array:
    """Adds one view's depth and colour [H, W, 4] to the sums [6, X, Y, Z]."""
    index = [jax.lax.broadcasted_iota(jnp.float32, volume.shape[1:], axis) for axis in range(3)]
    x, y, z = (origin[axis] + voxel * index[axis] for axis in range(3))
    pose, k = camera.world_to_camera, camera.intrinsics
    u, v, w = (pose[i, 0] * x + pose[i, 1] * y + pose[i, 2] * z + pose[i, 3] for i in range(3))
    ahead = jnp.where(w > 1e-6, w, 1.0)
    column = jnp.floor(k[0, 0] * u / ahead + k[0, 2])
    row = jnp.floor(k[1, 1] * v / ahead + k[1, 2])
    inside = (w > 1e-6) & (column >= 0) & (column < camera.width) & (row >= 0)
    inside &= row < camera.height
    place = jnp.where(inside, row * camera.width + column, 0.0).astype(jnp.int32)
    seen = maps.reshape(-1, 4)[place]
    signed = (seen[..., 0] - w) / (TRUNCATION * voxel)
    # Behind the surface nothing is known beyond the truncation distance. Depth errors grow with
    # depth, and few of the views that see past a surface are right.
    weight = jnp.where(inside & (seen[..., 0] > 0) & (signed > -1.0), 1.0, 0.0) / ahead**2
    near = jnp.where(signed < 1.0, weight, 0.0)
    weight = jnp.where(signed < 1.0, weight, FREE_WEIGHT * weight)
    colors = [near * seen[..., 1 + channel] for channel in range(3)]
    return volume + jnp.stack([weight, weight * jnp.minimum(signed, 1.0), near, *colors])


def _bounds(
    depths: Sequence[np.ndarray], cameras: Sequence[Camera]
) -> tuple[np.ndarray, np.ndarray] | None:
    """Corners of a box around nearly all that is seen, or None where nothing is."""
    points = []
    for depth, camera in zip(depths, cameras, strict=True):
        known = depth > 0
        pixels = pixel_grid(camera.height, camera.width)[known][::7]
        points.append(np.asarray(unproject(camera, pixels, depth[known][::7])))
    points = np.concatenate(points)
    if not len(points):
        return None
    low, high = np.percentile(points, [0.5, 99.5], axis=0)
    margin = 0.03 * (high - low).max() + 1e-6
    return low - margin, high + margin


def _without_edges(depth: np.ndarray) -> np.ndarray:
    """[H, W] with 0 where the depth jumps between a pixel and one of its neighbours."""
    from scipy.ndimage import maximum_filter, minimum_filter

    nearest = minimum_filter(np.where(depth > 0, depth, np.inf), 3)
    farthest = maximum_filter(depth, 3)
    return np.where(farthest - nearest < MAX_STEP * 3 * np.maximum(depth, 1e-9), depth, 0.0)


def _without_crumbs(vertices: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Drops connected pieces with few faces, and the vertices that nothing uses any more."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    edges = np.concatenate([faces[:, :2], faces[:, 1:]])
    graph = coo_array((np.ones(len(edges), bool), edges.T), shape=(len(vertices),) * 2)
    piece = connected_components(graph, directed=False)[1][faces[:, 0]]
    faces = faces[(np.bincount(piece) >= MIN_PIECE * len(faces))[piece]]
    used, faces = np.unique(faces, return_inverse=True)
    return vertices[used], faces.reshape(-1, 3)


def _sample(color: Sequence[np.ndarray], weight: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Sums of colours and weights [X, Y, Z] → mean colour [V, 3] at places [V, 3] in voxels."""
    from scipy.ndimage import map_coordinates

    total, *sums = (
        map_coordinates(volume, places.T, order=1, mode="nearest") for volume in (weight, *color)
    )
    return np.stack(sums, -1) / np.maximum(total, 1e-6)[:, None]
