"""One optimizer step, compiled once: images and masks in, updated state and metrics out.

Encodes the clean and the masked views, takes the loss on target views (paper Sec. 3.2; see
diffusion.loss), clips by global norm, applies AdamW with warm-up and moves the average. All
randomness of step n is fold_in(run key, n), so a resumed run draws what an uninterrupted one would.
A step whose loss or gradient is not finite leaves the model as it was and is counted.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from see3d_jax.diffusion.schedule import Schedule
from see3d_jax.training.gradient import loss_and_gradient
from see3d_jax.training.settings import OptimizerSpec, TrainSpec
from see3d_jax.training.sharding import state_shardings
from see3d_jax.training.state import Frozen, Params, TrainState


def make_optimizer(spec: OptimizerSpec) -> optax.GradientTransformation:
    """Global-norm clipping, then AdamW with linear warm-up to a constant learning rate.

    What `spec.trainable` leaves out is neither moved nor decayed, and has no moments.
    """

    def rate(count: jax.Array) -> jax.Array:
        return spec.learning_rate * jnp.minimum(1.0, (count + 1) / max(1, spec.warmup_steps))

    adamw = optax.chain(
        optax.clip_by_global_norm(spec.clip_norm),
        optax.adamw(rate, spec.b1, spec.b2, spec.eps, weight_decay=spec.weight_decay),
    )
    if spec.trainable == "all":
        return adamw

    def labels(params: Params) -> Params:
        return _map_paths(lambda path, _: "trained" if spec.trains(path) else "kept", params)

    return optax.partition({"trained": adamw, "kept": optax.set_to_zero()}, labels)


def trained_only(grads: Params, spec: OptimizerSpec) -> Params:
    """The gradient with zeros for what is not trained, which XLA then does not compute."""
    if spec.trainable == "all":
        return grads
    return _map_paths(lambda path, g: g if spec.trains(path) else jnp.zeros_like(g), grads)


def _map_paths(function: Callable[[str, Any], Any], tree: Params) -> Params:
    """function(path, leaf) for every leaf, paths as in parameters.txt."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: function(jax.tree_util.keystr(path, simple=True, separator="/"), leaf),
        tree,
    )


@functools.partial(jax.jit, static_argnames=("spec", "mesh"), donate_argnames=("state",))
def train_step(
    state: TrainState,
    batch: dict[str, jax.Array],
    frozen: Frozen,
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
      frozen: networks that are used and not trained.
      schedule: noise schedule.
      key: key of the whole run, the same at every step.
      spec: constants.
      mesh: where the new state is to live (by the rules of `sharding`).

    Returns:
      The new state and the scalars {"loss", "grad_norm", "skipped", "skipped_in_row"}.
    """
    loss, grads = loss_and_gradient(
        state.params, batch, frozen, schedule, jax.random.fold_in(key, state.step),
        spec=spec, mesh=mesh,
    )  # fmt: skip
    grads = trained_only(grads, spec.optimizer)
    new_state = _updated(state, loss, grads, spec)
    new_state = jax.lax.with_sharding_constraint(new_state, state_shardings(new_state, mesh))
    counts = {"skipped": new_state.skipped, "skipped_in_row": new_state.skipped_in_row}
    return new_state, {"loss": loss, "grad_norm": optax.tree.norm(grads)} | counts


def _updated(state: TrainState, loss: jax.Array, grads: Params, spec: TrainSpec) -> TrainState:
    """The state after a step with this loss and gradient."""
    updates, opt_state = make_optimizer(spec.optimizer).update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    # Warm-up: a fixed decay would keep the random first weights in the average for long.
    taken = state.step - state.skipped
    decay = jnp.minimum(spec.ema_decay, (1.0 + taken) / (10.0 + taken))
    # Written so that the average of what is not trained stays what it is, to the bit.
    ema_params = jax.tree.map(lambda e, p: e + (1 - decay) * (p - e), state.ema_params, params)

    finite = jnp.isfinite(loss) & jnp.isfinite(optax.tree.norm(grads))
    new, old = (params, ema_params, opt_state), (state.params, state.ema_params, state.opt_state)
    params, ema_params, opt_state = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)
    return TrainState(
        step=state.step + 1,
        params=params,
        ema_params=ema_params,
        opt_state=opt_state,
        skipped=state.skipped + ~finite,
        skipped_in_row=jnp.where(finite, 0, state.skipped_in_row + 1),
    )
