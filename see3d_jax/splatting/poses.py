"""Camera poses as something to correct: photos are aligned with what the scene shows.

Every time a view is shown, its camera takes one Gauss–Newton step of direct image alignment
(Lucas–Kanade with the efficient second-order gradient of Malis 2004): a pixel of the rendering,
whose depth is known, moves by its projection's Jacobian times the motion ξ of the camera, so the
image changes by −∇I · ∂pixel/∂ξ. Robust weights approach the absolute error. Steps need no rate,
as they solve for the motion itself; images are pooled at first, where motions are large.
A motion ξ = (rotation vector in radians, translation in scene units) acts in the camera's own axes:
world→camera becomes exp(ξ) · world→camera. Moving all cameras and the scene together changes no
picture, so nothing pulls that way; holding one camera still would only keep its own error in the
scene. What small drift there is, `carried_along` takes into account for cameras outside a fit.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from see3d_jax.geometry.transforms import nearest_rotation

# Errors above this (images in [0, 1]) count by their absolute value, smaller ones squared.
_SMALL_ERROR = 0.05
# Pixels that the scene covers less than this have no depth to move by.
_COVERED = 0.8
# Largest rotation (radians) and translation (of the mean depth) in one step.
_LONGEST_STEP = 0.02


def moved(world_to_camera: jax.Array, motion: jax.Array) -> jax.Array:
    """exp(motion) · pose: [..., 4, 4] × [..., 6] → [..., 4, 4]; differentiable, also at zero."""
    x, y, z = jnp.moveaxis(motion[..., :3], -1, 0)
    zero = jnp.zeros_like(x)
    rows = [[zero, -z, y], [z, zero, -x], [-y, x, zero]]
    cross = jnp.stack([jnp.stack(row, -1) for row in rows], -2)
    square = (motion[..., :3] ** 2).sum(-1)[..., None, None]
    tiny = square < 1e-8  # Taylor here: 0/0 otherwise, and an infinite slope of the root
    angle = jnp.sqrt(jnp.where(tiny, 1.0, square))
    sine = jnp.where(tiny, 1 - square / 6, jnp.sin(angle) / angle)
    cosine = jnp.where(tiny, 0.5 - square / 24, (1 - jnp.cos(angle)) / angle**2)
    rotation = jnp.eye(3) + sine * cross + cosine * jnp.matmul(cross, cross, precision="highest")
    top = jnp.matmul(rotation, world_to_camera[..., :3, :], precision="highest")
    top = top.at[..., 3].add(motion[..., 3:])
    return jnp.concatenate([top, world_to_camera[..., 3:, :]], -2)


def alignment_step(
    rgb: jax.Array,
    depth: jax.Array,
    alpha: jax.Array,
    truth: jax.Array,
    weight: jax.Array | None,
    intrinsics: jax.Array,
    pooling: int,
) -> jax.Array:
    """[6] motion of the camera that brings its rendering nearer to the photo.

    Args:
      rgb: [H, W, 3] rendering from the present pose, over black.
      depth, alpha: [H, W] of it, as in `render.Rendering`.
      truth: [H, W, 3] photo.
      weight: [H, W] ≥ 0, how much each pixel of the photo counts, or None.
      intrinsics: [3, 3] pixels.
      pooling: side of the squares of pixels whose means are aligned (static).
    """
    counts = (alpha > _COVERED).astype(rgb.dtype) * (1.0 if weight is None else weight)
    maps = jnp.concatenate([rgb, truth, jnp.stack([depth, alpha, counts], -1)], -1)
    maps = _pooled(maps, pooling)
    rgb, truth, depth, alpha, counts = (
        maps[..., :3],
        maps[..., 3:6],
        *jnp.moveaxis(maps[..., 6:], -1, 0),
    )
    z = depth / jnp.maximum(alpha, 1e-6)
    counts = jnp.where((counts > 0.99 * counts.max()) & (z > 0), counts, 0.0)
    typical = (z * counts).sum() / jnp.maximum(counts.sum(), 1e-6)
    z = jnp.where(counts > 0, z, 1.0)

    height, width = z.shape
    focal_x, focal_y = intrinsics[0, 0] / pooling, intrinsics[1, 1] / pooling
    x = (jnp.arange(width) + 0.5 - intrinsics[0, 2] / pooling) / focal_x
    y = ((jnp.arange(height) + 0.5 - intrinsics[1, 2] / pooling) / focal_y)[:, None]
    slope = _slopes((rgb + truth) / 2)  # [2, H, W, 3]
    along_x, along_y = slope[0] * focal_x, slope[1] * focal_y
    x, y = (jnp.broadcast_to(v, z.shape)[..., None] for v in (x, y))
    inverse = typical / z[..., None]  # translation in units of the typical depth: well conditioned
    towards = -(x * along_x + y * along_y)
    change = -jnp.stack(
        [
            y * towards - along_y,
            along_x - x * towards,
            x * along_y - y * along_x,
            inverse * along_x,
            inverse * along_y,
            inverse * towards,
        ],
        -1,
    )  # [H, W, 3, 6]: of the rendered colour, by each component of the motion
    error = rgb - truth
    weights = counts[..., None] / jnp.maximum(jnp.abs(error), _SMALL_ERROR)
    change, error, weights = change.reshape(-1, 6), error.reshape(-1), weights.reshape(-1, 1)
    weighted = change * weights
    normal = jnp.matmul(weighted.T, change, precision="highest")
    damping = 1e-2 * jnp.trace(normal) / 6 + 1e-6
    right = -jnp.matmul(weighted.T, error, precision="highest")
    step = jnp.linalg.solve(normal + damping * jnp.eye(6), right)
    step *= jnp.minimum(1.0, _LONGEST_STEP / jnp.maximum(jnp.abs(step).max(), 1e-12))
    return step.at[3:].multiply(typical)


def _pooled(maps: jax.Array, pooling: int) -> jax.Array:
    """Means over squares of pixels; what is left over at the right and below is cut off."""
    height, width = (side // pooling for side in maps.shape[:2])
    maps = maps[: height * pooling, : width * pooling]
    return maps.reshape(height, pooling, width, pooling, -1).mean((1, 3))


def _slopes(image: jax.Array) -> jax.Array:
    """[H, W, 3] → [2, H, W, 3] change per pixel in x and y; 0 at the border."""
    x = (image[1:-1, 2:] - image[1:-1, :-2]) / 2
    y = (image[2:, 1:-1] - image[:-2, 1:-1]) / 2
    return jnp.pad(jnp.stack([x, y]), ((0, 0), (1, 1), (1, 1), (0, 0)))


def carried_along(poses: np.ndarray, before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """World→camera poses [M, 4, 4] after the similarity that best takes `before` to `after`.

    `before` and `after` [V, 4, 4] are the same cameras; their centres and axes decide. Needed for
    cameras that took no part in a fit whose world has drifted.
    """
    poses, before, after = (np.asarray(x, np.float64) for x in (poses, before, after))

    def centres(matrices: np.ndarray) -> np.ndarray:
        return -np.einsum("nji,nj->ni", matrices[:, :3, :3], matrices[:, :3, 3])

    old, new = centres(before), centres(after)
    # The axes fix the rotation even for cameras on a line, where centres alone would not.
    turn = nearest_rotation(np.einsum("nji,njk->ik", after[:, :3, :3], before[:, :3, :3]))
    spread = old - old.mean(0)
    total = float((spread**2).sum())
    scale = float(((spread @ turn.T) * (new - new.mean(0))).sum()) / total if total > 0 else 1.0
    result = poses.copy()
    result[:, :3, :3] = poses[:, :3, :3] @ turn.T
    where = scale * (centres(poses) - old.mean(0)) @ turn.T + new.mean(0)
    result[:, :3, 3] = -np.einsum("nij,nj->ni", result[:, :3, :3], where)
    return result
