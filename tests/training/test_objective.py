"""What is trained, on what condition: the choices that decide what a run means."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_training import minuscule

from see3d_jax.diffusion.loss import diffusion_loss, draw_loss_noise
from see3d_jax.errors import InputError
from see3d_jax.models.weights import init_unet, parameter_count
from see3d_jax.training import inputs, settings, sharding, step
from see3d_jax.training.state import init_state

ATTENTION = "transformer_blocks"


def batch_of(rows=2, views=3, side=16):
    rng = np.random.default_rng(0)
    is_reference = np.arange(views) < 1
    mask = (rng.random((rows, views, side, side, 1)) < 0.7).astype(np.float32)
    mask[:, is_reference] = 1
    return {
        "image": rng.uniform(-1, 1, (rows, views, side, side, 3)).astype(np.float32),
        "mask": mask,
        "is_reference": np.tile(is_reference, (rows, 1)),
        "frame": np.tile(np.arange(views, dtype=np.int32), (rows, 1)),
    }


def start(config):
    """A network that is not new: a fresh one gives zero, whatever it is shown."""
    spec = settings.train_spec(config)
    rng = np.random.default_rng(1)
    params = jax.tree.map(
        lambda x: x + 0.05 * rng.standard_normal(x.shape, np.float32), init_unet(spec.unet, 0)
    )
    return init_state(params, step.make_optimizer(spec.optimizer))


def run(config, batch, steps=1):
    """State and metrics after some steps on the same batch."""
    spec, mesh = settings.train_spec(config), sharding.make_mesh(config)
    frozen = settings.frozen_networks(config, spec.unet)
    state = start(config)
    for _ in range(steps):
        state, metrics = step.train_step(
            state, sharding.put_batch(batch, mesh), frozen, settings.noise_schedule(config),
            jax.random.key(0), spec=spec, mesh=mesh,
        )  # fmt: skip
    return state, {name: float(value) for name, value in metrics.items()}


def by_path(tree):
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
        for path, leaf in leaves
    }


@functools.cache
def attention_only():
    config = minuscule("unused", trainable=ATTENTION, ema_decay=0.5)
    return config, *run(config, batch_of(), steps=3)


def test_what_is_not_trained_keeps_every_bit_also_in_the_average():
    config, state, metrics = attention_only()
    before = by_path(start(config).params)
    for tree in (state.params, state.ema_params):
        moved = {p for p, value in by_path(tree).items() if not np.array_equal(value, before[p])}
        assert all(ATTENTION in path for path in moved)
        assert len(moved) > 10
    assert metrics["skipped"] == 0 and metrics["grad_norm"] > 0


def test_what_is_not_trained_has_no_optimizer_state():
    _, state, _ = attention_only()
    trained = sum(x.size for p, x in by_path(state.params).items() if ATTENTION in p)
    moments = parameter_count(state.opt_state)
    assert 2 * trained <= moments <= 2 * trained + 4  # two moments, and counts
    assert moments < 0.5 * parameter_count(start(minuscule("unused")).opt_state)


@pytest.mark.slow
def test_the_gradient_of_what_is_not_trained_counts_for_nothing():
    optimizer = settings.train_spec(attention_only()[0]).optimizer
    grads = step.trained_only(jax.tree.map(jnp.ones_like, attention_only()[1].params), optimizer)
    for path, value in by_path(grads).items():
        assert (value == (ATTENTION in path)).all(), path


@pytest.mark.parametrize(
    "pattern, message", [("attn3", r"'attn3' matches no parameter"), ("(", r"'\(' is no regex")]
)
def test_a_choice_of_parameters_that_means_nothing_is_named(pattern, message):
    with pytest.raises(InputError, match=r"config\.trainable: " + message):
        settings.train_spec(minuscule("unused", trainable=pattern))


def test_conditions_differ_in_loss_and_are_sampled_as_they_are_trained():
    """Same network, batch and noise: only what is mixed into V_t is different."""
    batch = batch_of()
    losses = {}
    for condition, form in (
        ("unposed_t", "code"), ("unposed_t", "paper"), ("unposed_m", "code"), ("posed", "code"),
    ):  # fmt: skip
        config = minuscule("unused", condition=condition, **{"objective.weight_form": form})
        objective = settings.train_spec(config).objective
        expected = form if condition == "unposed_t" else "clean"
        assert objective.weight_form == settings.evaluation(config).sampler.weight_form == expected

        codec = settings.codec(config, settings.train_spec(config).unet)
        x_0, shown, mask = inputs.encode_batch(codec, batch)
        noise = draw_loss_noise(
            jax.random.key(0), jnp.arange(2), jnp.arange(3), x_0.shape[2:], num_timesteps=1000,
            drop_probability=0.0,
        )  # fmt: skip
        losses[condition, form], _ = diffusion_loss(
            lambda x, t, context: x[..., 4:8],  # answers with V_t
            settings.noise_schedule(config), x_0, shown, mask, jnp.asarray(batch["is_reference"]),
            None, noise, weight_form=objective.weight_form, beta=objective.beta,
        )  # fmt: skip
    assert np.isfinite(list(losses.values())).all()
    mixed, mixed_as_in_the_paper, *clean = (float(loss) for loss in losses.values())
    assert mixed != mixed_as_in_the_paper and clean[0] == clean[1] and clean[0] != mixed
