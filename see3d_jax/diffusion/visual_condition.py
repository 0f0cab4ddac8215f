"""The visual condition V_t (paper Sec. 3.2, App. C.3): what the network sees of the target views.

For targets, with C the latents of the masked (training) or warped (sampling) image and t' = ⌊β·t⌋:
    C_t = add_noise(C, ε', t')                                                              (1)
    V_t = W_t·C_t + (1 − W_t)·X_t                                                           (2)
Early on (large t) W_t ≈ 1 and the network leans on the condition; late, V_t approaches X_t itself,
so the shape of the corruption cannot leak into the result. Reference views stay clean in both X_t
and V_t. Network input: [X_t, V_t, M] along channels, M at latent size, 1 = known, references all 1.
Axes [B, V, h, w, c] throughout; any number of latent channels c.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from see3d_jax.diffusion.schedule import Schedule

WEIGHT_FORMS = ("code", "paper", "clean")
# What the condition shows of the targets (the paper's Table 3, and super-resolution):
#   unposed_t  the targets behind random masks, noised and mixed with X_t: the method
#   unposed_m  the targets behind random masks, as they are
#   posed      the references warped to the targets through true depth and poses, as they are
#   superres   the whole targets at half their resolution, as they are
CONDITIONS = ("unposed_t", "unposed_m", "posed", "superres")


def condition_form(condition: str, form: str) -> str:
    """The form of W_t that a model with this condition is trained and sampled with.

    `form` ("code" or "paper") is a choice for "unposed_t" only; the others take the condition as it
    is. Raises ValueError for an unknown condition, or a form that "unposed_t" does not have.
    """
    if condition not in CONDITIONS:
        raise ValueError(f"condition: expected one of {CONDITIONS}, got {condition!r}")
    if condition != "unposed_t":
        return "clean"
    if form not in ("code", "paper"):
        raise ValueError(f"weight_form: expected 'code' or 'paper', got {form!r}")
    return form


def condition_timestep(t: jax.Array, beta: float = 0.2, num_timesteps: int = 1000) -> jax.Array:
    """t' = ⌊β·t⌋, exact: looked up in a table, since float32 0.2·t can fall below an integer."""
    table = np.floor(np.arange(num_timesteps) * beta + 1e-9).astype(np.int32)
    return jnp.asarray(table)[t]


def mixing_weight(t: jax.Array, form: str = "code") -> jax.Array:
    """W_t, the share of the condition in V_t, for timesteps t of X_t. float32 in [0, 1].

    "code" is what the released weights were sampled with: it depends on t' and reaches 0.009 at
    t = 0. "paper" is written in t and decays five times faster below t = 300; above they agree (up
    to the rounding of t'). "clean" is 1: the condition as it is (the super-resolution model).
    The constants belong to β = 0.2: W stays the same function of t for another β.

    Raises:
      ValueError: an unknown form.
    """
    if form == "code":
        step = condition_timestep(t).astype(jnp.float32)
        late = 0.8 * jnp.exp(-0.075 * (60 - step))
        weight = jnp.where(step >= 60, 1 - 0.2 * (200 - step) / 140, late)
    elif form == "paper":
        step = jnp.asarray(t, jnp.float32)
        late = 0.8 * jnp.exp(-0.075 * (300 - step))
        weight = jnp.where(step >= 300, 1 - 0.2 * (1000 - step) / 700, late)
    elif form == "clean":
        weight = jnp.ones_like(t, jnp.float32)
    else:
        raise ValueError(f"weight form: expected one of {WEIGHT_FORMS}, got {form!r}")
    return jnp.clip(weight, 0, 1)


def mix_condition(
    schedule: Schedule,
    x_t: jax.Array,
    condition: jax.Array,
    eps: jax.Array,
    t: jax.Array,
    *,
    form: str = "code",
    beta: float = 0.2,
) -> jax.Array:
    """V_t on targets, eqs. (1) and (2).

    Args:
      schedule: the schedule that X_t follows.
      x_t: [B, V, h, w, c] noisy latents.
      condition: [B, V, h, w, c] latents C of the masked or warped images.
      eps: [B, V, h, w, c] unit noise ε', independent of X_t's; unused by form "clean".
      t: [B] or [B, V] timesteps of X_t.
      form, beta: see `mixing_weight`.
    """
    if form == "clean":
        return condition
    weight = mixing_weight(t, form)
    weight = weight.reshape(weight.shape + (1,) * (x_t.ndim - weight.ndim))
    c_t = schedule.add_noise(condition, eps, condition_timestep(t, beta, schedule.num_timesteps))
    return weight * c_t + (1 - weight) * x_t


def latent_mask(mask: jax.Array, factor: int) -> jax.Array:
    """[..., H, W, 1] → [..., H/factor, W/factor, 1]: the nearest (top-left) pixel of each block.

    What the released code does; training and sampling must do the same.
    """
    return mask[..., ::factor, ::factor, :]


def network_input(
    x_t: jax.Array,
    v_t: jax.Array,
    mask: jax.Array,
    x_0: jax.Array,
    is_reference: jax.Array,
    drop: jax.Array | None = None,
) -> jax.Array:
    """[X_t, V_t, M] with references pinned to their clean latents.

    Args:
      x_t, v_t: [B, V, h, w, c]; only their targets are used.
      mask: [B, V, h, w, 1], 1 = known; only targets are used, references count as known.
      x_0: [B, V, h, w, c]; only references are used.
      is_reference: [B, V] bool.
      drop: [B] bool, samples that go without the visual condition: V_t and M are zero on their
        targets, references stay. Guidance compares with this branch.

    Returns:
      [B, V, h, w, 2c + 1].
    """
    reference = is_reference[:, :, None, None, None]
    if drop is not None:
        keep = ~drop[:, None, None, None, None]
        v_t, mask = jnp.where(keep, v_t, 0), jnp.where(keep, mask, 0)
    return jnp.concatenate(
        [
            jnp.where(reference, x_0, x_t),
            jnp.where(reference, x_0, v_t),
            jnp.where(reference, 1, mask).astype(x_t.dtype),
        ],
        -1,
    )
