"""Camera poses as something to optimise: a small rigid motion per view, with its own Adam.

A motion ξ = (rotation vector in radians, translation in units of the scene's size) acts in the
camera's own axes: world→camera becomes exp(ξ) · world→camera. Moving all cameras and the scene
together changes no picture; to take this freedom away the first camera never moves.
Only the view that was shown is updated: moments of the others must not push them blindly.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from see3d_jax.geometry.transforms import nearest_rotation


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PoseState:
    """Motions of V cameras and their moments.

    Attributes:
      motions, first_moment, second_moment: [V, 6] float32.
      shown: [V] int32, updates of each view so far.
    """

    motions: jax.Array
    first_moment: jax.Array
    second_moment: jax.Array
    shown: jax.Array


def at_rest(views: int) -> PoseState:
    """No camera has moved yet."""
    zeros = jnp.zeros((views, 6), jnp.float32)
    return PoseState(zeros, zeros, zeros, jnp.zeros(views, jnp.int32))


def moved(world_to_camera: jax.Array, motion: jax.Array, scene_size: jax.Array) -> jax.Array:
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
    top = top.at[..., 3].add(motion[..., 3:] * scene_size)
    return jnp.concatenate([top, world_to_camera[..., 3:, :]], -2)


def adam_step(
    state: PoseState, gradient: jax.Array, index: jax.Array, rate: jax.Array
) -> PoseState:
    """Moves camera `index` against its gradient [6]; the first camera stays."""
    shown = state.shown[index] + 1
    first = 0.9 * state.first_moment[index] + 0.1 * gradient
    second = 0.99 * state.second_moment[index] + 0.01 * gradient**2
    step = (first / (1 - 0.9**shown)) / (jnp.sqrt(second / (1 - 0.99**shown)) + 1e-12)
    return PoseState(
        motions=state.motions.at[index].add(jnp.where(index == 0, 0.0, -rate * step)),
        first_moment=state.first_moment.at[index].set(first),
        second_moment=state.second_moment.at[index].set(second),
        shown=state.shown.at[index].set(shown),
    )


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
