"""Steps of the probability-flow ODE, from X_t at one noise level to X at a lower one.

With α = √ᾱ, σ = √(1 − ᾱ) and D the network's prediction of the clean latents, the ODE is
d(x/σ) = D d(α/σ) (1). DDIM holds D over a step. DPM-Solver++(2M) (Lu et al. 2022, Alg. 2) lets D
go on linearly in λ = ln(α/σ), from the last prediction and the one before: second order at no
extra network call. Neither uses ε at the start, so zero terminal SNR (α = 0, λ = −∞) is no problem
for v-prediction; what 2M does there and at σ = 0 is said at `multistep_weights`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from see3d_jax.diffusion.schedule import signal_and_noise

SOLVERS = ("ddim", "dpmpp_2m")


def ddim_step(x_0: jax.Array, eps: jax.Array, alpha_bar_next: jax.Array) -> jax.Array:
    """DDIM, η = 0: the predicted image and noise, mixed anew at the next level. [B, V, h, w, c]."""
    signal, noise = signal_and_noise(alpha_bar_next, x_0.ndim)
    return signal * x_0 + noise * eps


def multistep_weights(alpha_bar: jax.Array, alpha_bar_next: jax.Array) -> jax.Array:
    """DPM-Solver++(2M) as x ← w₀·x_t + w₁·D + w₂·D_before, the weights of all steps at once.

    Steps that have nothing to extrapolate from are of first order (w₂ = 0), that is DDIM: the
    first, and a last one that ends at σ = 0, an infinite distance h away in λ. After a start at
    ᾱ = 0 the first h is infinite too, and a secant over it would be flat; but D is smooth in
    e^λ, 0 there, so that dD/dλ = e^λ·dD/de^λ ≈ D − D_before: the second step counts h = 1.

    Args:
      alpha_bar: [steps] ᾱ at each network call, rising, > 0 except perhaps the first.
      alpha_bar_next: [steps] ᾱ where each step lands: the next call's, and the end.

    Returns:
      [steps, 3] float32.
    """
    alpha, sigma = signal_and_noise(alpha_bar, 1)
    alpha_next, sigma_next = signal_and_noise(alpha_bar_next, 1)
    shrink = sigma_next / sigma
    gain = alpha_next - alpha * shrink  # α'·(1 − e^{−h})

    def half_log_snr(alpha: jax.Array, sigma: jax.Array) -> jax.Array:
        return jnp.log(alpha) - jnp.log(sigma)

    distance = half_log_snr(alpha_next, sigma_next) - half_log_snr(alpha, sigma)  # h
    before = jnp.roll(distance, 1)
    slope = distance / (2 * jnp.where(jnp.isinf(before), 1, before))
    usable = (jnp.arange(alpha.shape[0]) > 0) & jnp.isfinite(distance)
    slope = jnp.where(usable, slope, 0)
    return jnp.stack([shrink, gain * (1 + slope), -gain * slope], -1)
