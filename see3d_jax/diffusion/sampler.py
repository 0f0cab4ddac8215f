"""Draws novel views: a solver of the sampling ODE over the schedule, as one `lax.scan`.

Each step pins the references to their clean latents, mixes the visual condition with fresh noise
(see visual_condition), predicts with and without the condition, guides, and steps X_t towards 0
(see solvers: DDIM, or the second-order DPM-Solver++(2M) for fewer steps).
Timesteps: "spaced" (default) takes exactly `num_steps` evenly spaced steps and ends at clean
latents; "quadratic" spaces them like squares, down to t = 0: a second-order solver needs that,
since even steps end in a leap from t = 1000 / num_steps. "official" repeats the released pipeline,
quirks included: "50" means 53 network calls (999, 980, … 11), each stepping by 1000 // 50 = 20
though the next call is 19 below, ending at ᾱ_0 (at 1 if the schedule says `set_alpha_to_one`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from see3d_jax.diffusion.guidance import guide
from see3d_jax.diffusion.loss import Denoise
from see3d_jax.diffusion.schedule import Schedule
from see3d_jax.diffusion.solvers import SOLVERS, ddim_step, multistep_weights
from see3d_jax.diffusion.visual_condition import WEIGHT_FORMS, mix_condition, network_input

TIMESTEPS = ("spaced", "quadratic", "official")


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
    """How to sample.

    Attributes:
      num_steps: nominal number of steps.
      timesteps: "spaced", "quadratic" or "official", see the module docstring.
      solver: "ddim" or "dpmpp_2m" (best with "quadratic", never with "official").
      guidance: g of `guidance.guide`; 0 runs the conditional branch only.
      guidance_rescale: see `guidance.guide`.
      weight_form: W_t, see `visual_condition.mixing_weight`; "clean" for super-resolution.
      beta: t' = ⌊beta·t⌋ of the condition's noise.
    """

    num_steps: int = 50
    timesteps: str = "spaced"
    solver: str = "ddim"
    guidance: float = 2.0
    guidance_rescale: float = 0.0
    weight_form: str = "code"
    beta: float = 0.2

    def __post_init__(self) -> None:
        if self.timesteps not in TIMESTEPS:
            raise ValueError(f"timesteps: expected one of {TIMESTEPS}, got {self.timesteps!r}")
        if self.solver not in SOLVERS:
            raise ValueError(f"solver: expected one of {SOLVERS}, got {self.solver!r}")
        if self.solver != "ddim" and self.timesteps == "official":
            raise ValueError(
                f"solver: {self.solver!r} needs timesteps='quadratic' or 'spaced': an "
                "official step does not land where the next one starts"
            )
        if self.weight_form not in WEIGHT_FORMS:
            raise ValueError(f"weight_form: expected one of {WEIGHT_FORMS}: {self.weight_form!r}")
        if not 1 <= self.num_steps <= 999:
            raise ValueError(f"num_steps: expected 1 to 999, got {self.num_steps}")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplerNoise:
    """All noise that a run draws, for repeating one exactly.

    Attributes:
      initial: [B, V, h, w, c], X_T on targets.
      condition: [calls, B, V, h, w, c], ε' of every step.
    """

    initial: jax.Array
    condition: jax.Array


def sampling_steps(
    config: SamplerConfig, num_timesteps: int = 1000
) -> tuple[np.ndarray, np.ndarray]:
    """The timesteps of the network calls and where each step lands, −1 for the end. Both int32."""
    last = num_timesteps - 1
    if config.timesteps == "official":
        calls = np.arange(last, 0, -(last // config.num_steps))
        landings = np.maximum(calls - num_timesteps // config.num_steps, -1)
    elif config.timesteps == "quadratic":
        upward = np.arange(config.num_steps)
        squares = last * (upward / max(config.num_steps - 1, 1)) ** 2
        # No timestep twice: the first squares lie less than 1 apart when there are many steps.
        calls = np.maximum(np.round(squares).astype(int), upward)[::-1]
        calls[0] = last
        landings = np.append(calls[1:], -1)
    else:
        spacing = num_timesteps / config.num_steps
        calls = np.round(num_timesteps - spacing * np.arange(config.num_steps)).astype(int) - 1
        landings = np.append(calls[1:], -1)
    return calls.astype(np.int32), landings.astype(np.int32)


def sample(
    denoise: Denoise,
    schedule: Schedule,
    config: SamplerConfig,
    latents: jax.Array,
    mask: jax.Array,
    is_reference: jax.Array,
    context: jax.Array,
    key: jax.Array,
    *,
    noises: SamplerNoise | None = None,
    progress: Callable[[int, int], None] | None = None,
    keep_steps: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Samples the target views. Pure: jit it once per shape, with the parameters as arguments.

    Args:
      denoise: (x [B', V, h, w, 2c+1], t [B', V], context) → [B', V, h, w, c]; B' is 2·B under
        guidance.
      schedule: noise schedule and what the network predicts.
      config: static.
      latents: [B, V, h, w, c] clean latents for references, latents of the warps for targets.
      mask: [B, V, h, w, 1] at latent size, 1 = known.
      is_reference: [B, V] bool.
      context: [B, V, L, context_dim], the same for both branches of guidance.
      key: seeds all noise, unless `noises` is given.
      noises: noise to use instead of drawing it.
      progress: called on the host as progress(calls done, calls in all) after every step, also
        under jit; calls may arrive late and out of order.
      keep_steps: also return the latents after every step.

    Returns:
      [B, V, h, w, c] latents, references as given; with keep_steps also [calls, B, V, h, w, c] raw
      latents after every step, where references hold what the step made of them.
    """
    calls, landings = sampling_steps(config, schedule.num_timesteps)
    alphas = jnp.asarray(schedule.alphas_cumprod)
    # The released pipeline ends at the first entry of the table, not at a fully clean image.
    early_end = config.timesteps == "official" and not schedule.set_alpha_to_one
    end = alphas[0] if early_end else jnp.ones((), jnp.float32)
    key_initial, key_condition = jax.random.split(key)
    initial = (
        jax.random.normal(key_initial, latents.shape, jnp.float32)
        if noises is None
        else noises.initial
    )
    reference = is_reference[:, :, None, None, None]

    def predict(x_t: jax.Array, v_t: jax.Array, t: jax.Array) -> jax.Array:
        t = jnp.broadcast_to(t, is_reference.shape)
        cond = network_input(x_t, v_t, mask, latents, is_reference)
        if not config.guidance:
            return denoise(cond, t, context)
        everyone = jnp.ones(x_t.shape[0], bool)
        uncond = network_input(x_t, v_t, mask, latents, is_reference, drop=everyone)
        both = denoise(
            jnp.concatenate([cond, uncond]), jnp.tile(t, (2, 1)), jnp.tile(context, (2, 1, 1, 1))
        )
        return guide(*jnp.split(both, 2), config.guidance, config.guidance_rescale)

    second_order = config.solver == "dpmpp_2m"

    def step(carry: tuple, inputs: tuple) -> tuple[tuple, jax.Array | None]:
        x, x_0_before = carry
        index, t, alpha_bar_next, weights, eps = inputs
        if noises is None:
            eps = jax.random.normal(jax.random.fold_in(key_condition, index), x.shape, jnp.float32)
        x_t = jnp.where(reference, latents, x)
        v_t = mix_condition(
            schedule, x_t, latents, eps, t, form=config.weight_form, beta=config.beta
        )
        x_0, noise = schedule.to_x0_eps(x_t, predict(x_t, v_t, t), t)
        if second_order:
            x = weights[0] * x_t + weights[1] * x_0 + weights[2] * x_0_before
        else:
            x = ddim_step(x_0, noise, alpha_bar_next)
        if progress is not None:
            jax.debug.callback(lambda i: progress(int(i) + 1, len(calls)), index)
        carry = (x, x_0 if second_order else None)
        return carry, (x if keep_steps else None)

    alpha_bar_next = jnp.where(landings >= 0, alphas[np.maximum(landings, 0)], end)
    inputs = (
        jnp.arange(len(calls)),
        jnp.asarray(calls),
        alpha_bar_next,
        multistep_weights(alphas[calls], alpha_bar_next) if second_order else None,
        None if noises is None else noises.condition,
    )
    start = (initial, jnp.zeros_like(initial) if second_order else None)
    (x, _), steps = jax.lax.scan(step, start, inputs)
    x = jnp.where(reference, latents, x)
    return (x, steps) if keep_steps else x
