"""What a fit minimises in the pictures: colour, perception, depth, smoothness.

Images are [H, W, 3] in [0, 1], maps [H, W]; weights [H, W] ≥ 0 say how much each pixel of the photo
counts. Depth terms work on disparity relative to the scene's size, so that they have no unit and
near errors count more than far ones.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from see3d_jax.evaluation.metrics import WINDOW, ssim, ssim_map
from see3d_jax.splatting.processor import BAND
from see3d_jax.splatting.render import Rendering

# Pixels that the scene covers less than this have no depth to compare.
_COVERED = 0.5
# Disparity errors (scene sizes) well above this count by their logarithm: edges, wrong depth.
_DISPARITY_ERROR = 0.05
# Share of a sparse point's disparity by which the scene may miss it.
_AT_POINT = 0.03
# Colour difference to the next pixel at which smoothness counts 1/e.
_COLOUR_STEP = 0.1


def photometric_loss(
    image: jax.Array,
    truth: jax.Array,
    weight: jax.Array | None,
    ssim_weight: float,
    mesh: Mesh | None = None,
) -> jax.Array:
    """(1 − λ)·L1 + λ·(1 − SSIM), weighted or not; SSIM on all devices of `mesh`."""
    error = jnp.abs(image - truth)
    if weight is None:
        absolute = error.mean()
    else:
        absolute = (error.mean(-1) * weight).sum() / (weight.sum() + 1e-6)
    if ssim_weight == 0.0:
        return absolute
    if mesh is None:
        similarity = ssim(image, truth, weight)
    else:
        similarity = _ssim_on(mesh, image, truth, weight)
    return (1 - ssim_weight) * absolute + ssim_weight * (1.0 - similarity)


def _ssim_on(mesh: Mesh, image: jax.Array, truth: jax.Array, weight: jax.Array | None) -> jax.Array:
    """`ssim`, of which each device computes the windows around some of the rows.

    Every device has the whole images: left to itself, XLA would exchange the rows that windows
    share, which takes longer than SSIM.
    """
    border = WINDOW // 2
    height, width = image.shape[0] - 2 * border, image.shape[1] - 2 * border
    counts = jnp.ones((height, 1))
    if weight is not None:
        counts = weight[border:-border, border:-border]
    rows = -(-height // mesh.size)

    def part(image: jax.Array, truth: jax.Array, counts: jax.Array, band: jax.Array) -> jax.Array:
        first = band[0] * rows
        start = jnp.minimum(first, height - rows)
        image, truth = (
            jax.lax.dynamic_slice_in_dim(i, start, rows + 2 * border) for i in (image, truth)
        )
        counts = jax.lax.dynamic_slice_in_dim(counts, start, rows)
        own = (start + jnp.arange(rows) >= first)[:, None]  # not those of the band before
        return (ssim_map(image, truth) * (own * counts)[..., None]).sum()[None]

    whole, split = PartitionSpec(), PartitionSpec(BAND)
    sums = jax.shard_map(
        part, mesh=mesh, in_specs=(whole, whole, whole, split), out_specs=split, check_vma=False
    )(image, truth, counts, jnp.arange(mesh.size, dtype=jnp.int32))
    return sums.sum() / (jnp.broadcast_to(counts, (height, width)).sum() * image.shape[-1])


def depth_loss(
    picture: Rendering,
    depth: jax.Array,
    weight: jax.Array | None,
    scene_size: jax.Array,
    free_scale: bool,
) -> jax.Array:
    """log(1 + (disparity error)²), on average over the pixels with depth.

    Args:
      picture: what the scene shows.
      depth: planar z that is known, 0 = unknown.
      weight: of the pixels, or None.
      scene_size: unit of the disparities.
      free_scale: first bring the given disparity to the scene's by the scale and shift that fit
        best, as monocular depth has none (static).
    """
    shown, known, counts = _disparities(picture.depth, picture.alpha, depth, weight, scene_size)
    if free_scale:
        known = _fitted(known, jax.lax.stop_gradient(shown), counts)
    return _robust_mean(shown - known, counts)


def point_loss(
    picture: Rendering, points: jax.Array, weight: jax.Array | None, scene_size: jax.Array
) -> jax.Array:
    """How far the scene is from sparse points that the view saw, as `depth_loss`.

    Haze before a wall and leaves at a wrong depth contradict no photo where few look there; the
    points do (DS-NeRF, Deng et al. 2022). Within `_AT_POINT` of one the photos have their way: a
    pixel sees more than the point.

    Args:
      picture: what the scene shows.
      points: [K, 3] x, y in pixels and planar z, 0 = none.
      weight: of the pixels, or None.
      scene_size: unit of the disparities.
    """
    columns, rows = points[:, :2].astype(jnp.int32).T
    weight = None if weight is None else weight[rows, columns]
    shown, known, counts = _disparities(
        picture.depth[rows, columns], picture.alpha[rows, columns], points[:, 2], weight, scene_size
    )
    return _robust_mean(jnp.maximum(jnp.abs(shown - known) - _AT_POINT * known, 0.0), counts)


def _disparities(
    summed: jax.Array,
    alpha: jax.Array,
    depth: jax.Array,
    weight: jax.Array | None,
    scene_size: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of pixels in any shape: shown and known disparity, and how much each counts.

    `summed` is the rendered depth times alpha.
    """
    counts = (depth > 0) * (alpha > _COVERED) * (1.0 if weight is None else weight)
    counts = jax.lax.stop_gradient(counts)
    known = jnp.where(depth > 0, scene_size / jnp.where(depth > 0, depth, 1.0), 0.0)
    z = jnp.where(counts > 0, summed / jnp.maximum(alpha, 1e-6), scene_size)
    return scene_size / jnp.maximum(z, 1e-3 * scene_size), known, counts


def _robust_mean(error: jax.Array, counts: jax.Array) -> jax.Array:
    penalty = jnp.log1p((error / _DISPARITY_ERROR) ** 2)
    return (penalty * counts).sum() / jnp.maximum(counts.sum(), 1e-6)


def _fitted(values: jax.Array, target: jax.Array, counts: jax.Array) -> jax.Array:
    """scale · values + shift nearest to `target` in weighted least squares."""
    total = jnp.maximum(counts.sum(), 1e-6)
    mean, mean_target = (values * counts).sum() / total, (target * counts).sum() / total
    centred = (values - mean) * counts
    variance = (centred * (values - mean)).sum()
    scale = (centred * (target - mean_target)).sum() / jnp.maximum(variance, 1e-9)
    return jnp.maximum(scale, 0.0) * (values - mean) + mean_target


def smoothness_loss(
    picture: Rendering, truth: jax.Array, intrinsics: jax.Array, scene_size: jax.Array
) -> jax.Array:
    """1 − cosine of the normals of neighbouring pixels, less where the photo has an edge.

    Normals are those of the surface through the depth of neighbouring pixels, in camera axes.
    """
    height, width = picture.alpha.shape
    covered = jax.lax.stop_gradient((picture.alpha > _COVERED).astype(picture.alpha.dtype))
    z = jnp.where(covered > 0, picture.depth / jnp.maximum(picture.alpha, 1e-6), scene_size)
    x = (jnp.arange(width) + 0.5 - intrinsics[0, 2]) / intrinsics[0, 0]
    y = (jnp.arange(height)[:, None] + 0.5 - intrinsics[1, 2]) / intrinsics[1, 1]
    points = jnp.stack([x * z, y * z, z], -1) / scene_size
    across = points[:-1, 1:] - points[:-1, :-1]
    down = points[1:, :-1] - points[:-1, :-1]
    normal = jnp.cross(across, down)
    normal /= jnp.sqrt((normal**2).sum(-1, keepdims=True) + 1e-12)
    covered = covered[:-1, :-1] * covered[1:, :-1] * covered[:-1, 1:]
    colour = truth[:-1, :-1]
    total, number = jnp.float32(0), jnp.float32(0)
    for axis in (0, 1):
        first, second = (slice(None, -1), slice(1, None)) if axis == 0 else (
            (slice(None), slice(None, -1)), (slice(None), slice(1, None))
        )  # fmt: skip
        edge = jnp.abs(colour[first] - colour[second]).mean(-1)
        counts = covered[first] * covered[second] * jnp.exp(-edge / _COLOUR_STEP)
        total += ((1 - (normal[first] * normal[second]).sum(-1)) * counts).sum()
        number += counts.sum()
    return total / jnp.maximum(number, 1e-6)
