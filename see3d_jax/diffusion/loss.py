"""The training loss of the multi-view model (paper Sec. 3.2).

Draws one timestep per sample (all its views share it), noises the targets, builds the visual
condition, and asks the network for the noise (or v). Only target views count: references are given
clean and have nothing to learn from. With probability 0.1 a sample goes without its visual
condition, which is what guidance at sampling time compares with. What is random about a view
depends on the key, its row in the whole batch and its place among the views, and on nothing else,
so that it is the same however rows and views are spread over devices.
"""

from __future__ import annotations

from collections.abc import Callable

import flax
import jax
import jax.numpy as jnp

from see3d_jax.diffusion.schedule import Schedule
from see3d_jax.diffusion.visual_condition import mix_condition, network_input

Denoise = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]

WEIGHTINGS = ("prediction", "sample", "min_snr")
_MIN_SNR_GAMMA = 5.0  # Hang et al. 2023


@flax.struct.dataclass
class LossNoise:
    """Everything that is random in the loss.

    Attributes:
      t: [B] int32 timesteps.
      dropped: [B] bool, samples without visual condition.
      eps: [B, V, h, w, c] float32 noise of X_t.
      eps_condition: [B, V, h, w, c] float32 noise ε' of the condition.
    """

    t: jax.Array
    dropped: jax.Array
    eps: jax.Array
    eps_condition: jax.Array


def draw_loss_noise(
    key: jax.Array,
    rows: jax.Array,
    views: jax.Array,
    latent_shape: tuple[int, int, int],
    *,
    num_timesteps: int,
    drop_probability: float,
) -> LossNoise:
    """Draws the noise of some rows and views of a batch.

    Args:
      key: random key of the whole batch.
      rows: [B] int32, positions of the rows in the whole batch.
      views: [V] int32, positions of the views in their samples.
      latent_shape: (h, w, c) of one view.
      num_timesteps: t is drawn from 0 … num_timesteps − 1.
      drop_probability: share of samples without visual condition.
    """

    def one_view(view_key: jax.Array) -> jax.Array:
        return jax.random.normal(view_key, (2, *latent_shape), jnp.float32)

    def one_row(row: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        key_t, key_drop, key_views = jax.random.split(jax.random.fold_in(key, row), 3)
        noise = jax.vmap(lambda view: one_view(jax.random.fold_in(key_views, view)))(views)
        t = jax.random.randint(key_t, (), 0, num_timesteps)
        return t, jax.random.bernoulli(key_drop, drop_probability), noise

    t, dropped, noise = jax.vmap(one_row)(rows)
    return LossNoise(t, dropped, noise[:, :, 0], noise[:, :, 1])


def diffusion_loss(
    denoise: Denoise,
    schedule: Schedule,
    x_0: jax.Array,
    condition: jax.Array,
    mask: jax.Array,
    is_reference: jax.Array,
    context: jax.Array,
    noise: LossNoise,
    *,
    weight_form: str = "code",
    beta: float = 0.2,
    weighting: str = "prediction",
    view_loss: Callable[[jax.Array], jax.Array] | None = None,
    targets: jax.Array | None = None,
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
      noise: see `draw_loss_noise`.
      weight_form, beta: see `visual_condition.mixing_weight`.
      weighting: what counts alike at all timesteps: "prediction", errors of what the network
        predicts; "sample", errors of x_0, which low noise, where hardly anything is left to learn,
        adds little to; "min_snr", errors of x_0 times min(SNR, 5) (Hang et al. 2023).
      view_loss: what else counts about a view, the same at all timesteps: estimated x_0
        [B, V, h, w, c] → [B, V], with its weight.
      targets: number of target views to divide by where these arrays are part of a larger batch,
        whose loss is then the sum over the parts; None: the number in `is_reference`.

    Returns:
      The scalar loss, and per sample {"t": [B] int32, "loss": [B] float32 (unweighted,
      without `view_loss`), "dropped": [B] bool}.
    """
    t = noise.t
    x_t = schedule.add_noise(x_0, noise.eps, t)
    v_t = mix_condition(
        schedule, x_t, condition, noise.eps_condition, t, form=weight_form, beta=beta
    )
    inputs = network_input(x_t, v_t, mask, x_0, is_reference, noise.dropped)
    output = denoise(inputs, jnp.broadcast_to(t[:, None], is_reference.shape), context)

    error = jnp.square(output.astype(jnp.float32) - schedule.target(x_0, noise.eps, t))
    is_target = (~is_reference).astype(jnp.float32)
    per_view = error.mean((2, 3, 4)) * is_target  # [B, V]
    here = is_target.sum(1)  # [B]
    per_sample = per_view.sum(1)
    weight = _timestep_weight(schedule, t, weighting)
    total = (weight * per_sample).sum()
    if view_loss is not None:
        total += (view_loss(schedule.to_x0_eps(x_t, output, t)[0]) * is_target).sum()
    loss = total / jnp.maximum(here.sum() if targets is None else targets, 1)
    return loss, {"t": t, "loss": per_sample / jnp.maximum(here, 1), "dropped": noise.dropped}


def _timestep_weight(schedule: Schedule, t: jax.Array, weighting: str) -> jax.Array:
    """[B] weights of squared errors of the prediction."""
    if weighting not in WEIGHTINGS:
        raise ValueError(f"weighting: expected one of {WEIGHTINGS}, got {weighting!r}")
    if weighting == "prediction":
        return jnp.ones(t.shape, jnp.float32)
    alpha_bar = jnp.asarray(schedule.alphas_cumprod)[t]
    snr = alpha_bar / (1 - alpha_bar)
    # The same error of x_0 makes a squared error this many times larger in what is predicted.
    magnified = {"epsilon": snr, "v": snr + 1, "sample": 1}[schedule.prediction]
    return (jnp.minimum(snr, _MIN_SNR_GAMMA) if weighting == "min_snr" else 1.0) / magnified
