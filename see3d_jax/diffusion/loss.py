"""The training loss of the multi-view model (paper Sec. 3.2).

Draws one timestep per sample (all its views share it), noises the targets, builds the visual
condition, and asks the network for the noise (or v). Only target views count: references are given
clean and have nothing to learn from. With probability 0.1 a sample goes without its visual
condition, which is what guidance at sampling time compares with.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from see3d_jax.diffusion.schedule import Schedule
from see3d_jax.diffusion.visual_condition import mix_condition, network_input

Denoise = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def diffusion_loss(
    denoise: Denoise,
    schedule: Schedule,
    x_0: jax.Array,
    condition: jax.Array,
    mask: jax.Array,
    is_reference: jax.Array,
    context: jax.Array,
    key: jax.Array,
    *,
    drop_probability: float = 0.1,
    weight_form: str = "code",
    beta: float = 0.2,
    min_snr_gamma: float | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean squared error over the entries of target views.

    Args:
      denoise: (x [B, V, h, w, 2c+1], t [B, V], context) → [B, V, h, w, c].
      schedule: noise schedule and what the network predicts.
      x_0: [B, V, h, w, c] clean latents of all views.
      condition: [B, V, h, w, c] latents of the masked (or warped) images.
      mask: [B, V, h, w, 1] at latent size, 1 = known.
      is_reference: [B, V] bool; every sample needs at least one target to count.
      context: [B, V, L, context_dim].
      key: random key; the same key gives the same loss.
      drop_probability: share of samples without visual condition.
      weight_form, beta: see `visual_condition.mixing_weight`.
      min_snr_gamma: weight samples by min(SNR, gamma) (Hang et al. 2023); None: all alike.

    Returns:
      The scalar loss, and per sample {"t": [B] int32, "loss": [B] float32 (unweighted),
      "dropped": [B] bool}.
    """
    batch = x_0.shape[0]
    key_t, key_eps, key_condition, key_drop = jax.random.split(key, 4)
    t = jax.random.randint(key_t, (batch,), 0, schedule.num_timesteps)
    eps = jax.random.normal(key_eps, x_0.shape, jnp.float32)
    eps_condition = jax.random.normal(key_condition, x_0.shape, jnp.float32)
    dropped = jax.random.bernoulli(key_drop, drop_probability, (batch,))

    x_t = schedule.add_noise(x_0, eps, t)
    v_t = mix_condition(schedule, x_t, condition, eps_condition, t, form=weight_form, beta=beta)
    inputs = network_input(x_t, v_t, mask, x_0, is_reference, dropped)
    output = denoise(inputs, jnp.broadcast_to(t[:, None], is_reference.shape), context)

    error = jnp.square(output.astype(jnp.float32) - schedule.target(x_0, eps, t))
    is_target = (~is_reference).astype(jnp.float32)
    per_view = error.mean((2, 3, 4)) * is_target  # [B, V]
    targets = is_target.sum(1)  # [B]
    per_sample = per_view.sum(1)
    weight = _snr_weight(schedule, t, min_snr_gamma)
    loss = (weight * per_sample).sum() / jnp.maximum(targets.sum(), 1)
    aux = {"t": t, "loss": per_sample / jnp.maximum(targets, 1), "dropped": dropped}
    return loss, aux


def _snr_weight(schedule: Schedule, t: jax.Array, gamma: float | None) -> jax.Array:
    """[B] weights: min(SNR, γ)/SNR for epsilon, min(SNR, γ)/(SNR + 1) for v."""
    if gamma is None:
        return jnp.ones(t.shape, jnp.float32)
    alpha_bar = jnp.asarray(schedule.alphas_cumprod)[t]
    snr = alpha_bar / (1 - alpha_bar)
    divisor = snr if schedule.prediction == "epsilon" else snr + 1
    return jnp.minimum(snr, gamma) / divisor
