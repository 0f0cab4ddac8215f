"""Smooth contents for the holes of condition images, under a multi-scale Gaussian prior.

The statistics of photographs are nearly the same at every scale. As a tree: a pixel is its parent,
the average of 2 × 2 pixels, plus a difference with the same variance at all levels. Given the known
pixels, the posterior mean is found in two passes over a pyramid. Upwards, with y an observation
and p its precision (known pixels: ∞, holes: 0), in units of the difference's variance,

    q = p / (1 + p),   p' = Σ q,   y' = Σ q·y / p'                  (sums over 2 × 2)            (1)

and downwards, x' the parent's mean, interpolated bilinearly so that no blocks show:

    x = (p·y + x') / (p + 1)                                                                     (2)

It is the classic pull–push (Gortler et al. 1996) with weights that follow from a prior. On warps of
the synthetic scenes it is half a dB closer to the truth than OpenCV's Telea inpainting.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

_SURE = 1e6  # precision of a known pixel


def fill_holes(images: jax.Array, known: jax.Array) -> jax.Array:
    """Fills holes smoothly from what is known around them; known pixels stay as they are.

    Args:
      images: [..., H, W, c] float32; what stands in holes does not matter.
      known: [..., H, W, 1], > 0.5 = known. An image without a known pixel becomes zero.
    """
    lead, shape = images.shape[:-3], images.shape[-3:]
    seen = (known > 0.5).reshape(-1, *shape[:2], 1)
    value = jnp.where(seen, images.reshape(-1, *shape), 0.0)
    precision = jnp.where(seen, jnp.float32(_SURE), 0.0)

    levels = []
    while max(value.shape[1:3]) > 1:
        levels.append((value, precision))
        shared = precision / (1 + precision)
        total = _pool(shared)
        value = _pool(shared * value) / jnp.maximum(total, 1e-6)
        precision = total
    filled = value * (precision > 0)
    for value, precision in reversed(levels):
        parent = _enlarged(filled, value.shape[1:3])
        filled = (precision * value + parent) / (precision + 1)
    return jnp.where(seen, images.reshape(-1, *shape), filled).reshape(*lead, *shape)


def _pool(x: jax.Array) -> jax.Array:
    """Sums over 2 × 2; an odd last row or column is a group of its own."""
    padding = ((0, 0), (0, x.shape[1] % 2), (0, x.shape[2] % 2), (0, 0))
    n, height, width, channels = (x := jnp.pad(x, padding)).shape
    return x.reshape(n, height // 2, 2, width // 2, 2, channels).sum((2, 4))


def _enlarged(x: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Twice the size, bilinear, cut to `size`."""
    n, height, width, channels = x.shape
    large = jax.image.resize(x, (n, 2 * height, 2 * width, channels), "linear")
    return large[:, : size[0], : size[1]]
