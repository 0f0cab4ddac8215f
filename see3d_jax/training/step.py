"""One optimizer step, compiled once: images and masks in, updated state and metrics out.

Encodes the clean and the masked views, takes the loss on target views (paper Sec. 3.2; see
diffusion.loss), clips by global norm, applies AdamW with warm-up and moves the average. All
randomness of step n is fold_in(run key, n), so a resumed run draws what an uninterrupted one would.
Missing pixels are black (−1) in the masked views, as they are in a warped image.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from see3d_jax.diffusion.loss import Denoise, diffusion_loss
from see3d_jax.diffusion.schedule import Schedule
from see3d_jax.diffusion.visual_condition import latent_mask
from see3d_jax.models.weights import apply_unet
from see3d_jax.training.settings import OptimizerSpec, TrainSpec
from see3d_jax.training.sharding import state_shardings
from see3d_jax.training.state import Params, TrainState

EMPTY = -1.0  # black in the model's range


def make_optimizer(spec: OptimizerSpec) -> optax.GradientTransformation:
    """Global-norm clipping, then AdamW with linear warm-up to a constant learning rate."""

    def rate(count: jax.Array) -> jax.Array:
        return spec.learning_rate * jnp.minimum(1.0, (count + 1) / max(1, spec.warmup_steps))

    return optax.chain(
        optax.clip_by_global_norm(spec.clip_norm),
        optax.adamw(rate, spec.b1, spec.b2, spec.eps, weight_decay=spec.weight_decay),
    )


def encode_batch(codec: Any, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Batch → (clean latents [B, V, h, w, c], condition latents, mask at latent size)."""
    x_0 = codec.encode(batch["image"])
    masked = jnp.where(batch["mask"] > 0.5, batch["image"], EMPTY)
    condition = codec.encode(masked)
    return x_0, condition, latent_mask(batch["mask"], codec.factor)


def null_context(is_reference: jax.Array, tokens: int, context_dim: int) -> jax.Array:
    """[B, V, tokens, context_dim] zeros: the model is told nothing but the views themselves."""
    return jnp.zeros((*is_reference.shape, tokens, context_dim), jnp.float32)


def denoiser(spec: TrainSpec, params: Params) -> Denoise:
    """The network with its parameters filled in."""
    return functools.partial(apply_unet, spec.unet, params)


@functools.partial(jax.jit, static_argnames=("spec", "mesh"), donate_argnames=("state",))
def train_step(
    state: TrainState,
    batch: dict[str, jax.Array],
    codec: Any,
    schedule: Schedule,
    key: jax.Array,
    *,
    spec: TrainSpec,
    mesh: Mesh,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Takes one step.

    Args:
      state: donated; its buffers must not be used afterwards.
      batch: see `data.pipeline`, placed by `sharding.put_batch`.
      codec: image ↔ latent codec.
      schedule: noise schedule.
      key: key of the whole run, the same at every step.
      spec: constants.
      mesh: where the new state is to live (by the rules of `sharding`).

    Returns:
      The new state and {"loss", "grad_norm"} scalars.
    """
    x_0, condition, mask = encode_batch(codec, batch)
    is_reference = batch["is_reference"]
    context = null_context(is_reference, spec.context_tokens, spec.unet.context_dim)
    step_key = jax.random.fold_in(key, state.step)

    def loss_of(params: Params) -> tuple[jax.Array, dict[str, jax.Array]]:
        return diffusion_loss(
            denoiser(spec, params), schedule, x_0, condition, mask, is_reference, context, step_key,
            drop_probability=spec.objective.drop_probability,
            weight_form=spec.objective.weight_form,
            beta=spec.objective.beta,
            min_snr_gamma=spec.objective.min_snr_gamma,
        )  # fmt: skip

    (loss, _), grads = jax.value_and_grad(loss_of, has_aux=True)(state.params)
    updates, opt_state = make_optimizer(spec.optimizer).update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    # Warm-up: a fixed decay would keep the random first weights in the average for long.
    decay = jnp.minimum(spec.ema_decay, (1.0 + state.step) / (10.0 + state.step))
    ema_params = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, state.ema_params, params)
    new_state = TrainState(state.step + 1, params, ema_params, opt_state)
    new_state = jax.lax.with_sharding_constraint(new_state, state_shardings(new_state, mesh))
    return new_state, {"loss": loss, "grad_norm": optax.tree.norm(grads)}
