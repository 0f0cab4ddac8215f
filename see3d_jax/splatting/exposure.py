"""Exposure of every photo: a gain and an offset per channel that the scene does not have to learn.

A photo shows gain · scene + offset. Both are found in closed form whenever the view is shown (least
squares with a pull to 1 and 0), and go part of the way there. Brightening all photos and the scene
together changes no picture, so the mean over the views is kept at gain 1 and offset 0: views that
took no part in a fit are then drawn as the scene is. Where all photos are equally bright, nothing
is applied: what is found there is the fit's error, and light that changes along the path.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

# Share of the way to the solution at each showing.
_GAIN = 0.2
# Every so many rows are looked at: two numbers need no more, and sums over all took a fifth of the
# time of a step.
_ROWS = 4
# Pull to gain 1 and offset 0, as squared error per pixel.
_PULL = 1e-3
# Exposures apply in full where their `spread` is at least the second, and not at all below the
# first: 4 and 6 of 255 levels.
_SPREADS = 0.015, 0.025


def identity(views: int) -> jax.Array:
    """[V, 3, 2]: gain 1 and offset 0 of every channel of V views."""
    return jnp.broadcast_to(jnp.array([1.0, 0.0], jnp.float32), (views, 3, 2))


def exposed(image: jax.Array, exposure: jax.Array) -> jax.Array:
    """[..., 3] colours as a photo of this exposure [3, 2] shows them."""
    return image * exposure[:, 0] + exposure[:, 1]


def spread(exposures: jax.Array) -> jax.Array:
    """[] by how much photos [V, 3, 2] differ: standard deviation of what mid-grey becomes."""
    shift = 0.5 * (exposures[..., 0] - 1.0) + exposures[..., 1]  # on average 0
    return jnp.sqrt((shift**2).mean())


def applied(exposures: jax.Array) -> jax.Array:
    """[V, 3, 2] as they are used: all of them, or none if photos hardly differ."""
    low, high = _SPREADS
    share = jnp.clip((spread(exposures) - low) / (high - low), 0.0, 1.0)
    none = identity(len(exposures))
    return none + share * (exposures - none)


def updated(
    exposures: jax.Array,
    index: jax.Array,
    image: jax.Array,
    truth: jax.Array,
    weight: jax.Array | None,
) -> jax.Array:
    """[V, 3, 2] after view `index` was shown: its rendering and its photo [H, W, 3]."""
    image, truth = image[::_ROWS], truth[::_ROWS]
    counts = jnp.ones(image.shape[:2]) if weight is None else weight[::_ROWS]
    counts = (counts / jnp.maximum(counts.sum(), 1e-6))[..., None]
    # Normal equations of (gain − 1, offset) per channel.
    aa, ab = (counts * image * image).sum((0, 1)), (counts * image).sum((0, 1))
    error = truth - image
    ra, rb = (counts * image * error).sum((0, 1)), (counts * error).sum((0, 1))
    aa, bb = aa + _PULL, 1.0 + _PULL
    determinant = aa * bb - ab * ab
    change = jnp.stack([bb * ra - ab * rb, aa * rb - ab * ra], -1) / determinant[:, None]
    target = change + jnp.array([1.0, 0.0])
    exposures = exposures.at[index].add(_GAIN * (target - exposures[index]))
    return exposures - exposures.mean(0) + jnp.array([1.0, 0.0])
