"""A head start for small networks: they correct what Gaussian statistics already know.

X_t and, where M = 1, V_t are two noisy looks at the same clean latents x_0. If x_0 were Gaussian
with deviation s per channel, its expectation given both would be linear in them:

    x̂_0 = (√ᾱ_t·X_t/(1 − ᾱ_t) + √ᾱ_t'·C_t/(1 − ᾱ_t' + ᾱ_t'·d²)) / p                             (1)
    p    = 1/s² + ᾱ_t/(1 − ᾱ_t) + ᾱ_t'/(1 − ᾱ_t' + ᾱ_t'·d²)                                     (2)
    x_0  ≈ x̂_0 + F(X_t, V_t, M)/√p                                                               (3)

with C_t solved from V_t = W_t·C_t + (1 − W_t)·X_t. The network F has only the rest to learn, in
units of what is uncertain (Karras et al. 2022, c_skip and c_out, for two observations instead of
one). d is how wrong C_t is by itself: a tenth of s where M = 1 (warped, or cut by a mask). Where
M = 0, "gaussian" takes no notice of C_t (d = ∞). "filled" has the holes of the condition images
filled smoothly (`hole_fill`). What that gives is no noisy look but itself an expectation: x_0 = C
plus an error that C knows nothing of, whose deviation h = 0.6·s is what it was on warped views of
synthetic scenes. So C takes the place of the prior,

    x_0 ~ N(k·C_t, v),  k = √ᾱ_t'·c²/(ᾱ_t'·c² + 1 − ᾱ_t'),  v = h² + (1 − k·√ᾱ_t')·c²           (4)

with c² = s² − h², the variance of C. Known pixels need no training then, and in the holes it starts
from what inpainting gives. Ours, not See3D's: released weights were trained without, so this is for
models that start from nothing.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from see3d_jax.diffusion.hole_fill import fill_holes
from see3d_jax.diffusion.loss import Denoise
from see3d_jax.diffusion.schedule import Schedule
from see3d_jax.diffusion.visual_condition import condition_timestep, mixing_weight

PRECONDITIONINGS = ("none", "gaussian", "filled")
_DISTRUST = 0.1  # d as a share of s, where M = 1
_FILL_ERROR = 0.6  # h as a share of s


def condition_images(images: jax.Array, known: jax.Array, kind: str) -> jax.Array:
    """What a head start of this kind is shown of masked or warped images, before encoding.

    Args:
      images: [..., H, W, 3] float32 with black holes; known: [..., H, W, 1], 1 = known.
    """
    return fill_holes(images, known) if kind == "filled" else images


def precondition(
    network: Denoise,
    kind: str,
    schedule: Schedule,
    deviation: np.ndarray,
    *,
    form: str,
    beta: float,
) -> Denoise:
    """The network with its head start, again a function that predicts what `schedule` says.

    Args:
      network: F, (x [B, V, h, w, 2c+1], t [B, V], context) → [B, V, h, w, c].
      kind: "gaussian" or "filled", or "none" for the network as it is.
      schedule: schedule of X_t; the result is in its prediction type.
      deviation: [c], s: deviation of clean latents.
      form, beta: the mixing weight W_t that V_t is made with, see `visual_condition`.

    Raises ValueError for an unknown kind.
    """
    if kind not in PRECONDITIONINGS:
        raise ValueError(f"preconditioning: expected one of {PRECONDITIONINGS}, got {kind!r}")
    if kind == "none":
        return network

    def denoise(x: jax.Array, t: jax.Array, context: jax.Array) -> jax.Array:
        mean, spread = gaussian_estimate(
            x, t, schedule, deviation, form=form, beta=beta, filled=kind == "filled"
        )
        x_0 = mean + spread * network(x, t, context).astype(jnp.float32)
        return schedule.from_x0(x[..., : len(deviation)], x_0, t)

    return denoise


def gaussian_estimate(
    x: jax.Array,
    t: jax.Array,
    schedule: Schedule,
    deviation: np.ndarray,
    *,
    form: str,
    beta: float,
    filled: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """x̂_0 and its deviation 1/√p, both [B, V, h, w, c], from a network input; eqs. (1) and (2).

    `filled` says that the condition has something in its holes. References (clean X_t, M = 1) get
    values without meaning: nothing is asked about them.
    """
    channels = len(deviation)
    x_t, v_t, mask = jnp.split(x, (channels, 2 * channels), -1)
    variance = jnp.square(jnp.asarray(deviation, jnp.float32))

    signal, noise = schedule.coefficients(t, x.ndim)
    weight = mixing_weight(t, form).reshape(signal.shape)
    c_t = (v_t - (1 - weight) * x_t) / weight
    if form == "clean":
        signal_c, noise_c = 1.0, 0.0
    else:
        t_c = condition_timestep(t, beta, schedule.num_timesteps)
        signal_c, noise_c = schedule.coefficients(t_c, x.ndim)

    trust = signal / jnp.square(noise)
    trust_c = mask * signal_c / (jnp.square(noise_c) + jnp.square(signal_c * _DISTRUST) * variance)
    prior, look = 1 / variance, signal_c * trust_c
    if filled:  # but for views that go without a condition: their V_t is zero
        fill = variance * (1 - _FILL_ERROR**2)
        kept = signal_c * fill / (jnp.square(signal_c) * fill + jnp.square(noise_c))
        expected = 1 / (_FILL_ERROR**2 * variance + (1 - kept * signal_c) * fill)
        here = (mask < 0.5) & jnp.any(v_t != 0, (2, 3, 4), keepdims=True)
        prior = jnp.where(here, expected, prior)
        trust_c = jnp.where(here, kept * expected, trust_c)
    precision = prior + signal * trust + look
    return (trust * x_t + trust_c * c_t) / precision, jax.lax.rsqrt(precision)
