"""Everything a training run must remember between two steps, as one pytree of plain arrays.

Parameters, Adam moments and the moving average are float32 nested dicts with string keys, whatever
the compute precision. `as_dict` / `from_dict` turn the optimizer's named tuples into nested dicts,
so that checkpoints carry no Python class names and can be read by any tool. `Frozen` holds the
networks that a run uses but never changes, and that no checkpoint repeats.
"""

from __future__ import annotations

from typing import Any

import flax
import jax
import jax.numpy as jnp
import optax

from see3d_jax.evaluation.lpips import Lpips
from see3d_jax.models.codec import Codec
from see3d_jax.models.context import ImageContext

Params = dict[str, Any]


@flax.struct.dataclass
class TrainState:
    """What `train_step` takes and returns.

    Attributes:
      step: [] int32, number of finished steps, skipped ones included.
      params: nested dict of float32 arrays.
      ema_params: exponential moving average of `params`; used for sampling and release.
      opt_state: optax state (clipping, Adam moments, schedule count).
      skipped: [] int32, steps in all whose loss or gradient was not finite and which therefore
        changed nothing else.
      skipped_in_row: [] int32, how many of them since the last good step.
    """

    step: jax.Array
    params: Params
    ema_params: Params
    opt_state: optax.OptState
    skipped: jax.Array
    skipped_in_row: jax.Array


@flax.struct.dataclass
class Frozen:
    """The networks around the trained one; passes through jit.

    Attributes:
      codec: image ↔ latent codec.
      context_encoder: what makes the context out of a picture; None: the context is all zeros.
      perceptual: network of the loss's LPIPS term, or None.
    """

    codec: Codec
    context_encoder: ImageContext | None = None
    perceptual: Lpips | None = None


def init_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step; the average starts at the parameters."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        # A copy, because the step function donates its input and must not get one buffer twice.
        ema_params=jax.tree.map(jnp.copy, params),
        opt_state=optimizer.init(params),
        skipped=jnp.zeros((), jnp.int32),
        skipped_in_row=jnp.zeros((), jnp.int32),
    )


def as_dict(state: TrainState) -> dict[str, Any]:
    """TrainState → nested dict with string keys only."""
    return flax.serialization.to_state_dict(state)


def from_dict(target: TrainState, values: dict[str, Any]) -> TrainState:
    """Inverse of `as_dict`; `target` gives the structure."""
    return flax.serialization.from_state_dict(target, values)
