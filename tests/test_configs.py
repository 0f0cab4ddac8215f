"""The shipped configs: consistent, complete, and of the size the paper states."""

from __future__ import annotations

import importlib

import jax
import pytest

from see3d_jax.errors import InputError
from see3d_jax.models.weights import abstract_unet, parameter_count
from see3d_jax.training import settings
from see3d_jax.training.sharding import make_mesh
from see3d_jax.training.state import init_state
from see3d_jax.training.step import make_optimizer

CONFIGS = ("tiny", "webvi3d")


def load(name):
    return importlib.import_module(f"configs.{name}").get_config()


@pytest.mark.parametrize("name", CONFIGS)
def test_every_value_is_accepted_by_the_module_that_uses_it(name):
    config = load(name)
    config.data.path = "clips"
    settings.check_counts(config)
    settings.train_spec(config)
    settings.example_spec(config)
    settings.noise_schedule(config)
    settings.sampler_config(config)


@pytest.mark.parametrize("name", CONFIGS)
def test_all_configs_have_the_same_keys(name):
    def keys(config):
        return {key for key, _ in flat(config.to_dict()) if not key.startswith("codec.")}

    def flat(values, prefix=""):
        for key, value in values.items():
            if isinstance(value, dict):
                yield from flat(value, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}", value

    assert keys(load(name)) == keys(load("tiny"))


def test_webvi3d_builds_the_released_architecture_with_its_optimizer_state():
    spec = settings.train_spec(load("webvi3d"))
    params = abstract_unet(spec.unet)
    assert parameter_count(params) == 865_925_124
    state = jax.eval_shape(lambda p: init_state(p, make_optimizer(spec.optimizer)), params)
    assert parameter_count(state.ema_params) == 865_925_124
    assert parameter_count(state.opt_state) > 2 * 865_925_124  # two Adam moments, and counts
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state.params)} == {"float32"}


@pytest.mark.parametrize("name, init_from", [("webvi3d", ""), ("webvi3d", "w"), ("tiny", "w")])
def test_what_needs_converted_weights_is_refused_rather_than_trained_without(name, init_from):
    config = load(name)
    config.init_from = init_from
    with pytest.raises(InputError, match=r"cannot start from converted weights"):
        settings.codec(config, settings.train_spec(config).unet)


def test_tiny_fits_together_and_follows_its_codec():
    config = load("tiny")
    codec = settings.codec(config, settings.train_spec(config).unet)
    assert config.model.out_channels == codec.channels
    config.codec.channels = 5  # derived values follow
    assert (config.model.in_channels, config.model.out_channels) == (11, 5)
    make_mesh(config)


@pytest.mark.parametrize(
    "section, key, value, message",
    [
        ("model", "channel_mult", (2, 1), "config.model: channel_mult"),
        ("model", "head_dim", 7, "config.model: head_dim"),
        ("model", "in_channels", 3, "config.model: in_channels and out_channels"),
        ("data", "image_size", 50, "config.data.image_size: 50 is not a multiple"),
        ("codec", "channels", 99, "config.codec"),
        ("codec", "kind", "jpeg", "config.codec"),
        (None, "condition", "unposed", "config.condition: expected one of"),
        ("objective", "weight_form", "clean", "config.objective.weight_form: expected 'code'"),
        ("schedule", "prediction", "epsilon", "config.schedule: prediction"),
        ("evaluation", "sampler_steps", 0, "config.evaluation: num_steps"),
        ("mesh", "fsdp", 3, "config.mesh"),
        ("optimizer", "warmup_steps", "many", None),
    ],
)
def test_a_value_that_does_not_fit_names_its_key(section, key, value, message):
    config = load("tiny")
    config.lock()
    if message is None:
        with pytest.raises(TypeError):  # config files are typed
            config[section][key] = value
        return
    (config[section] if section else config)[key] = value
    with pytest.raises(InputError, match=message.replace(".", r"\.")):
        settings.noise_schedule(config)
        settings.sampler_config(config)
        settings.codec(config, settings.train_spec(config).unet)
        make_mesh(config)
