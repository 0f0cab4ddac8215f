"""Trains one small model on several layouts of 8 pretended devices and prints what came out.

Run by test_sharding.py in a process of its own, because the number of devices is fixed at start.

    python run_layouts.py LAYOUT …      e.g. 1,1,1,1 (data, fsdp, view, tensor) or 2,2,2,1,ring

Prints JSON: {layout: {"losses", "gradient", "split", "errors"}} where "gradient" is the largest
difference of the first gradient from that of the plain formula on one device, relative to the
largest entry, "split" the number of arrays of the state that no device holds whole, "errors" those
that evaluation finds after training. With --plain also, on the last layout: "plain", the gradient's
difference for the formula left to XLA; "sampled", whether sampled views are finite; "references",
how much the views that were given differ afterwards.
"""

from __future__ import annotations

import functools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from test_training import minuscule

from see3d_jax.diffusion.loss import diffusion_loss, draw_loss_noise
from see3d_jax.diffusion.precondition import precondition
from see3d_jax.diffusion.sampler import SamplerConfig
from see3d_jax.models.weights import apply_unet, init_unet
from see3d_jax.training import evaluate, inputs, settings, sharding, step
from see3d_jax.training.state import Frozen, init_state

ROWS, VIEWS, STEPS = 8, 8, 20
sharding.MIN_SPLIT_BYTES = 1024


def batches():
    rng = np.random.default_rng(0)
    # One to three references: devices that hold some of the views differ in how much they learn.
    is_reference = np.arange(VIEWS) < 1 + np.arange(ROWS)[:, None] % 3
    while True:
        yield {
            "image": rng.uniform(-1, 1, (ROWS, VIEWS, 16, 16, 3)).astype(np.float32),
            "mask": (rng.random((ROWS, VIEWS, 16, 16, 1)) < 0.7).astype(np.float32),
            "is_reference": is_reference,
            "frame": np.tile(np.arange(VIEWS, dtype=np.int32), (ROWS, 1)),
        }


def config_of(layout, **overrides):
    mesh = {f"mesh.{axis}": size for axis, size in zip(sharding.AXES, layout)}
    overrides = {"batch_size": ROWS, "data.views": VIEWS} | mesh | overrides
    return minuscule("unused", **overrides)


def awake(unet):
    """Parameters without any zero-initialised layer, so that every path has a gradient."""
    rng = np.random.default_rng(1)
    noisy = lambda x: x + 0.05 * rng.standard_normal(x.shape, np.float32)  # noqa: E731
    return jax.tree.map(noisy, init_unet(unet, 0))


def plain_loss(params, batch, frozen, schedule, key, spec):
    """The training loss as a formula over whole arrays."""
    x_0, condition, mask = inputs.encode_batch(frozen.codec, batch, spec.objective.preconditioning)
    context = inputs.batch_context(frozen, batch, spec.context_tokens, spec.unet.context_dim)
    noise = draw_loss_noise(
        key, jnp.arange(ROWS), jnp.arange(VIEWS), x_0.shape[2:],
        num_timesteps=schedule.num_timesteps,
        drop_probability=spec.objective.drop_probability,
    )  # fmt: skip
    mixing = {"form": spec.objective.weight_form, "beta": spec.objective.beta}
    denoise = precondition(
        functools.partial(apply_unet, spec.unet, params),
        spec.objective.preconditioning, schedule, frozen.codec.deviation, **mixing,
    )  # fmt: skip
    return diffusion_loss(
        denoise, schedule, x_0, condition, mask, batch["is_reference"], context, noise,
        weight_form=mixing["form"], beta=mixing["beta"], weighting=spec.objective.weighting,
    )[0]  # fmt: skip


@functools.cache
def formula(spec):
    return jax.jit(jax.grad(functools.partial(plain_loss, spec=spec)))


@functools.cache
def single_gradient(spec):
    """The formula's gradient of the first batch on one device."""
    config = config_of((1, 1, 1, 1))
    frozen, schedule = Frozen(settings.codec(config, spec.unet)), settings.noise_schedule(config)
    key = jax.random.fold_in(jax.random.key(0), 0)
    return formula(spec)(awake(spec.unet), next(batches()), frozen, schedule, key)


def run(name, plain):
    *layout, exchange = name.split(",") if name.endswith("ring") else (*name.split(","), "gather")
    layout = [int(size) for size in layout]
    config = config_of(layout, **{"model.view_exchange": exchange})
    spec, schedule = settings.train_spec(config), settings.noise_schedule(config)
    frozen = Frozen(settings.codec(config, spec.unet))
    mesh = sharding.make_mesh(config, jax.devices()[: int(np.prod(layout))])
    stream, key = batches(), jax.random.key(0)
    fresh = init_state(awake(spec.unet), step.make_optimizer(spec.optimizer))
    state = sharding.put_whole(fresh, sharding.state_shardings(fresh, mesh))
    split = sum(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state))
    result = {"split": split}

    batch = sharding.put_batch(next(stream), mesh)
    single = single_gradient(spec)
    if plain:
        by_xla = formula(spec)(state.params, batch, frozen, schedule, jax.random.fold_in(key, 0))
        result["plain"] = difference(by_xla, single)

    losses = []
    for index in range(STEPS):
        state, metrics = step.train_step(state, batch, frozen, schedule, key, spec=spec, mesh=mesh)
        losses.append(float(metrics["loss"]))
        if index == 0:
            result["gradient"] = difference(first_gradient(state, spec), clipped(single, spec))
        batch = sharding.put_batch(next(stream), mesh)
    trained = (state.params, batch, frozen, schedule, key)
    errors = evaluate.target_errors(*trained, spec=spec, mesh=mesh, buckets=2, rows=ROWS)
    if plain:
        views = evaluate.sample_views(
            *trained, spec=spec, mesh=mesh, sampler=SamplerConfig(num_steps=2, guidance=1.0)
        )
        known = np.asarray(batch["is_reference"])
        decoded = frozen.codec.decode(frozen.codec.encode(np.asarray(batch["image"])))
        result["references"] = difference(
            np.asarray(views)[known], np.clip(np.asarray(decoded), -1, 1)[known]
        )
        result["sampled"] = bool(np.isfinite(np.asarray(views)).all())
    return result | {"losses": losses, "errors": np.asarray(errors).ravel().tolist()}


def first_gradient(state, spec):
    """The gradient of the first step, as it entered Adam's first moment."""
    moment = optax.tree.get(state.opt_state, "mu")
    return jax.tree.map(lambda m: m / (1 - spec.optimizer.b1), moment)


def clipped(gradient, spec):
    norm = optax.tree.norm(gradient)
    scale = min(1.0, spec.optimizer.clip_norm / float(norm))
    return jax.tree.map(lambda g: g * scale, gradient)


def difference(found, wanted):
    pairs = [
        (np.asarray(a), np.asarray(b))
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted))
    ]
    return max(float(np.abs(a - b).max()) for a, b in pairs) / max(
        float(np.abs(b).max()) for _, b in pairs
    )


if __name__ == "__main__":
    plain = "--plain" in sys.argv
    names = [name for name in sys.argv[1:] if not name.startswith("--")]
    print(json.dumps({name: run(name, plain and name == names[-1]) for name in names}))
