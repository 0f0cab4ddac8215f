"""Classifier-free guidance against "no warp" (not "no reference").

The released model states its scale as g in out = (1 + g)·cond − g·uncond, so its g = 2 is what
other projects call 3. Both branches run as one batch, conditional half first.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def guide(cond: jax.Array, uncond: jax.Array, guidance: float, rescale: float = 0.0) -> jax.Array:
    """Combines the two predictions, all [B, V, h, w, c].

    `rescale` in [0, 1] pulls each view's standard deviation back to that of `cond`, against
    over-saturation at large guidance (Lin et al. 2023, Sec. 3.4); 0 is off.
    """
    guided = (1 + guidance) * cond - guidance * uncond
    if not rescale:
        return guided
    deviation = [jnp.std(x, axis=(2, 3, 4), keepdims=True, ddof=1) for x in (cond, guided)]
    return (rescale * deviation[0] / deviation[1] + (1 - rescale)) * guided
