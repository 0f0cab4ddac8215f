"""Growing a scene inside fixed array sizes: relocation in the manner of 3DGS-MCMC.

As in Kheradmand et al. 2024 Gaussians that have faded are moved onto others, drawn at random, and
empty slots are filled the same way, so the number of Gaussians rises to the capacity without a
single recompilation. Where to and how is nearer to 3DGS (Kerbl et al. 2023, Sec. 5.2), though:
- The chance of a Gaussian is its opacity times the root of its pull across the image, by which 3DGS
  sees that there are too few; 3DGS-MCMC takes the opacity alone.
- A Gaussian and its copies are smaller than it was, as opaque, and drawn from it. 3DGS-MCMC leaves
  them at one place, hardly smaller, with opacities that together look like it (Eq. 9), for noise
  to tell them apart in 30,000 steps. Fits of a few thousand do not make them fine and opaque again.

For comparison also as in 3DGS: small Gaussians that are pulled hard are cloned, large ones split,
faded ones dropped. Left out: resetting opacities every 3000 steps, which the fits here are too
short for.
"""

from __future__ import annotations

import dataclasses
from typing import TypeVar

import jax
import jax.numpy as jnp

from see3d_jax.geometry.cameras import Camera
from see3d_jax.splatting.gaussians import EMPTY_LOGIT, Gaussians
from see3d_jax.splatting.projection import rotation_columns

DEAD_OPACITY = 0.005
Moments = TypeVar("Moments")
# 3DGS: mean gradient by the place in the image (in half image widths) from which there are too few
CROWDED = 2e-4
# Gaussians, and the largest standard deviation, in scene sizes, that is still cloned.
SMALL = 0.01
# The parts of a split Gaussian are smaller by this.
SPLIT_SHRINK = 1.6
# `relocate` draws them at this many of its standard deviations: with the size that they have left
# they are spread as widely as it was.
SPLIT_SPREAD = (1.0 - SPLIT_SHRINK**-2) ** 0.5


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

    def mean(self) -> jax.Array:
        """[N] pull in a view that shows the Gaussian."""
        return self.pull / jnp.maximum(self.shown, 1)

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


def relocate(
    gaussians: Gaussians,
    moments: Moments,
    crowding: Crowding,
    key: jax.Array,
    target: int | jax.Array,
) -> tuple[Gaussians, Moments, jax.Array]:
    """Moves faded Gaussians onto visible ones and fills empty slots.

    Args:
      gaussians: N slots (the capacity).
      moments: pytree of [N, …] optimiser state; zeroed where a Gaussian was moved or split.
      crowding: statistics since the last round.
      key: PRNG key.
      target: how many of the slots to occupy, if not more are already.

    Returns:
      The new Gaussians and moments, and how many slots are occupied now.
    """
    number = gaussians.count
    opacity = jax.nn.sigmoid(gaussians.opacity_logits)
    occupied = gaussians.opacity_logits > EMPTY_LOGIT / 2
    alive = opacity > DEAD_OPACITY
    target = jnp.maximum(target, occupied.sum())
    # Faded slots first, then empty ones, until `target` Gaussians are alive.
    turn = jnp.argsort(jnp.argsort(jnp.where(alive, 2, jnp.where(occupied, 0, 1)), stable=True))
    revived = ~alive & (turn < target - alive.sum()) & alive.any()

    # By opacity alone, most copies would go to where everything is right already; without the root,
    # to the few that are pulled hardest. The small number is for scenes that nothing pulls.
    share = jnp.where(alive, opacity * jnp.sqrt(crowding.mean() + 1e-12), 0.0)
    share /= jnp.maximum(share.sum(), 1e-12)
    source_key, place_key = jax.random.split(key)
    source = jax.random.choice(source_key, number, (number,), p=share)
    source = jnp.where(revived, source, jnp.arange(number))
    copies = 1 + jnp.zeros(number, jnp.int32).at[source].add(revived.astype(jnp.int32))
    divided = copies > 1
    whole = jax.tree.map(lambda leaf: leaf[source], gaussians)
    part = divided[source, None]
    means = whole.means + jnp.where(part, SPLIT_SPREAD * _drawn_from(whole, place_key), 0.0)
    log_scales = whole.log_scales - jnp.where(part, jnp.log(SPLIT_SHRINK), 0.0)
    moved = dataclasses.replace(whole, means=means, log_scales=log_scales)
    return moved, _cleared(moments, revived | divided), (occupied | revived).sum()


def clone_and_split(
    gaussians: Gaussians,
    moments: Moments,
    crowding: Crowding,
    key: jax.Array,
    target: int | jax.Array,
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
    pull = jnp.where(alive, crowding.mean(), 0.0)
    wanting = pull > CROWDED
    room = jnp.maximum(target, occupied.sum()) - alive.sum()
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
