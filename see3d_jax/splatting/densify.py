"""Growing a scene inside fixed array sizes: relocation as in 3DGS-MCMC (Kheradmand et al. 2024).

Gaussians that have faded are moved onto visible ones, and empty slots are filled the same way, so
the number of Gaussians rises to the capacity without a single recompilation. A Gaussian that
receives n − 1 copies is split so that the n of them together look like the one before (Eq. 9).
"""

from __future__ import annotations

import dataclasses
from math import comb
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from see3d_jax.splatting.gaussians import EMPTY_LOGIT, Gaussians

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
    source = jax.random.choice(key, number, (number,), p=share / jnp.maximum(share.sum(), 1e-12))
    source = jnp.where(revived, source, jnp.arange(number))
    copies = 1 + jnp.zeros(number, jnp.int32).at[source].add(revived.astype(jnp.int32))
    new_opacity, shrink = _split(opacity, jnp.minimum(copies, MAX_COPIES))
    divided = copies > 1
    logits = jnp.where(divided, _logit(new_opacity), gaussians.opacity_logits)
    log_scales = gaussians.log_scales + jnp.where(divided, jnp.log(shrink), 0.0)[:, None]

    split = dataclasses.replace(gaussians, opacity_logits=logits, log_scales=log_scales)
    touched = revived | divided

    def cleared(leaf: jax.Array) -> jax.Array:
        return jnp.where(touched.reshape(-1, *[1] * (leaf.ndim - 1)), 0.0, leaf)

    moved = jax.tree.map(lambda leaf: leaf[source], split)
    return moved, jax.tree.map(cleared, moments), (occupied | revived).sum()


def _split(opacity: jax.Array, copies: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Opacity of each of n copies, and the factor on their scales."""
    each = 1.0 - (1.0 - opacity) ** (1.0 / copies)
    each = jnp.clip(each, DEAD_OPACITY, 1.0 - 1e-6)
    powers = each[:, None] ** jnp.arange(1, MAX_COPIES + 1)
    return each, opacity / jnp.maximum((jnp.asarray(_SERIES)[copies] * powers).sum(-1), 1e-6)


def _logit(probability: jax.Array) -> jax.Array:
    return jnp.log(probability) - jnp.log1p(-probability)
