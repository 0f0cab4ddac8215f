"""Growing a scene inside fixed array sizes: relocation as in 3DGS-MCMC (Kheradmand et al. 2024).

Gaussians that have faded are moved onto visible ones, and empty slots are filled the same way, so
the number of Gaussians rises to the capacity without a single recompilation. A Gaussian that
receives n − 1 copies is split so that the n of them together look like the one before (Eq. 9). The
copies are drawn from it: at one place they would get the same gradient for ever.

For comparison also as in 3DGS (Kerbl et al. 2023, Sec. 5.2): small Gaussians that are pulled hard
across the image are cloned, large ones split, faded ones dropped. Left out: resetting opacities
every 3000 steps, which the fits here are too short for.
"""

from __future__ import annotations

import dataclasses
from math import comb
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from see3d_jax.geometry.cameras import Camera
from see3d_jax.splatting.gaussians import EMPTY_LOGIT, Gaussians
from see3d_jax.splatting.projection import rotation_columns

DEAD_OPACITY = 0.005
# More copies of one Gaussian at once are split as if they were this many.
MAX_COPIES = 16
# Row n: C(n, k + 1) (−1)^k / sqrt(k + 1), the series of Eq. 9 for n copies.
_SERIES = np.array(
    [
        [comb(n, k + 1) * (-1.0) ** k / np.sqrt(k + 1) for k in range(MAX_COPIES)]
        for n in range(MAX_COPIES + 1)
    ],
    np.float32,
)
Moments = TypeVar("Moments")
# 3DGS: mean gradient by the place in the image (in half image widths) from which there are too few
CROWDED = 2e-4
# Gaussians, and the largest standard deviation, in scene sizes, that is still cloned.
SMALL = 0.01
# Both halves of a split Gaussian are smaller by this.
SPLIT_SHRINK = 1.6


def relocate(
    gaussians: Gaussians, moments: Moments, key: jax.Array, growth: float | jax.Array
) -> tuple[Gaussians, Moments, jax.Array]:
    """Moves faded Gaussians onto visible ones and grows the scene by a factor.

    Args:
      gaussians: N slots (the capacity).
      moments: pytree of [N, …] optimiser state; zeroed where a Gaussian was moved or split.
      key: PRNG key.
      growth: factor ≥ 1 by which the number of occupied slots may grow.

    Returns:
      The new Gaussians and moments, and how many slots are occupied now.
    """
    number = gaussians.count
    opacity = jax.nn.sigmoid(gaussians.opacity_logits)
    occupied = gaussians.opacity_logits > EMPTY_LOGIT / 2
    alive = opacity > DEAD_OPACITY
    target = jnp.minimum(number, jnp.ceil(growth * occupied.sum()).astype(jnp.int32))
    # Faded slots first, then empty ones, until `target` Gaussians are alive.
    turn = jnp.argsort(jnp.argsort(jnp.where(alive, 2, jnp.where(occupied, 0, 1)), stable=True))
    revived = ~alive & (turn < target - alive.sum()) & alive.any()

    share = jnp.where(alive, opacity, 0.0)
    share /= jnp.maximum(share.sum(), 1e-12)
    source_key, place_key = jax.random.split(key)
    source = jax.random.choice(source_key, number, (number,), p=share)
    source = jnp.where(revived, source, jnp.arange(number))
    copies = 1 + jnp.zeros(number, jnp.int32).at[source].add(revived.astype(jnp.int32))
    new_opacity, shrink = _split(opacity, jnp.minimum(copies, MAX_COPIES))
    divided = copies > 1
    logits = jnp.where(divided, _logit(new_opacity), gaussians.opacity_logits)
    log_scales = gaussians.log_scales + jnp.where(divided, jnp.log(shrink), 0.0)[:, None]

    split = dataclasses.replace(gaussians, opacity_logits=logits, log_scales=log_scales)
    moved = jax.tree.map(lambda leaf: leaf[source], split)
    means = moved.means + jnp.where(revived[:, None], _drawn_from(moved, place_key), 0.0)
    moved = dataclasses.replace(moved, means=means)
    return moved, _cleared(moments, revived | divided), (occupied | revived).sum()


def _split(opacity: jax.Array, copies: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Opacity of each of n copies, and the factor on their scales."""
    each = 1.0 - (1.0 - opacity) ** (1.0 / copies)
    each = jnp.clip(each, DEAD_OPACITY, 1.0 - 1e-6)
    powers = each[:, None] ** jnp.arange(1, MAX_COPIES + 1)
    return each, opacity / jnp.maximum((jnp.asarray(_SERIES)[copies] * powers).sum(-1), 1e-6)


def _logit(probability: jax.Array) -> jax.Array:
    return jnp.log(probability) - jnp.log1p(-probability)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Crowding:
    """How hard every Gaussian was pulled across the image since the last round.

    Attributes:
      pull: [N] sum of the gradients by the place in the image, in half image widths.
      shown: [N] in how many views there was one.
    """

    pull: jax.Array
    shown: jax.Array

    @classmethod
    def none(cls, count: int) -> Crowding:
        """For a new round."""
        return cls(jnp.zeros(count), jnp.zeros(count))

    def seen(self, gaussians: Gaussians, gradient: jax.Array, camera: Camera) -> Crowding:
        """With the gradient [N, 3] by the means of one more view.

        A Gaussian that moves by z / f across the viewing direction moves by a pixel; what pulls
        along that direction does not count.
        """
        matrix = camera.world_to_camera
        across = jnp.matmul(gradient, matrix[:2, :3].T, precision="highest")
        depth = jnp.matmul(gaussians.means, matrix[2, :3], precision="highest") + matrix[2, 3]
        pixel = jnp.maximum(depth, 0.0) / camera.intrinsics[0, 0]
        pull = jnp.sqrt((across**2).sum(-1)) * pixel * (camera.width / 2)
        return Crowding(self.pull + pull, self.shown + (pull > 0))


def clone_and_split(
    gaussians: Gaussians,
    moments: Moments,
    crowding: Crowding,
    key: jax.Array,
    growth: float | jax.Array,
    scene_size: float | jax.Array,
) -> tuple[Gaussians, Moments]:
    """A round of the classic growth; arguments and results as of `relocate`.

    Where there is no room for all that want a copy, those that are pulled hardest get one.
    """
    number = gaussians.count
    occupied = gaussians.opacity_logits > EMPTY_LOGIT / 2
    alive = occupied & (jax.nn.sigmoid(gaussians.opacity_logits) > DEAD_OPACITY)
    alive = jnp.where(alive.any(), alive, occupied)
    logits = jnp.where(alive, gaussians.opacity_logits, EMPTY_LOGIT)
    pull = jnp.where(alive, crowding.pull / jnp.maximum(crowding.shown, 1), 0.0)
    wanting = pull > CROWDED
    room = jnp.minimum(number, jnp.ceil(growth * occupied.sum()).astype(jnp.int32)) - alive.sum()
    taken = jnp.clip(wanting.sum(), 0, room)
    parents = jnp.argsort(jnp.where(wanting, -pull, 0.0), stable=True)  # hardest pulled first
    slots = jnp.argsort(alive, stable=True)  # empty ones first
    rank = jnp.arange(number)
    source = rank.at[slots].set(jnp.where(rank < taken, parents, slots))
    divided = jnp.zeros(number, bool).at[parents].set(rank < taken)
    child = source != rank

    large = jnp.exp(gaussians.log_scales).max(-1) > SMALL * scene_size
    split = (divided & large)[source]
    after = dataclasses.replace(gaussians, opacity_logits=logits)
    after = jax.tree.map(lambda leaf: leaf[source], after)
    # Halves are drawn from the Gaussian that they replace.
    means = after.means + jnp.where(split[:, None], _drawn_from(after, key), 0.0)
    log_scales = after.log_scales - jnp.where(split, jnp.log(SPLIT_SHRINK), 0.0)[:, None]
    touched = child | split | ~alive
    return (
        dataclasses.replace(after, means=means, log_scales=log_scales),
        _cleared(moments, touched),
    )


def _drawn_from(gaussians: Gaussians, key: jax.Array) -> jax.Array:
    """[N, 3] a random place in each of N Gaussians, from its mean."""
    local = jax.random.normal(key, (gaussians.count, 3)) * jnp.exp(gaussians.log_scales)
    return jnp.einsum("ijn,nj->ni", rotation_columns(gaussians.quaternions), local)


def _cleared(moments: Moments, touched: jax.Array) -> Moments:
    def cleared(leaf: jax.Array) -> jax.Array:
        return jnp.where(touched.reshape(-1, *[1] * (leaf.ndim - 1)), 0.0, leaf)

    return jax.tree.map(cleared, moments)
