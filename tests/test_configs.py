"""The shipped configs: consistent, complete, and of the size the paper states."""

from __future__ import annotations

import functools
import importlib

import jax
import pytest

from see3d_jax.errors import InputError
from see3d_jax.models.clip_vision import ClipVisionConfig
from see3d_jax.models.codec import VaeCodec
from see3d_jax.models.context import ImageContext
from see3d_jax.models.vae import VaeConfig
from see3d_jax.models.weights import (
    abstract_clip_vision,
    abstract_unet,
    abstract_vae,
    parameter_count,
)
from see3d_jax.training import settings
from see3d_jax.training.sharding import make_mesh
from see3d_jax.training.state import Frozen, init_state
from see3d_jax.training.step import make_optimizer, train_step

TABLE3 = ("ablations.table3_posed", "ablations.table3_unposed_t", "ablations.table3_unposed_m")
STAGES = ("webvi3d", "webvi3d_stage2", "superres")
CONFIGS = ("tiny", *STAGES, *TABLE3)


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
    settings.evaluation(config)


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


@pytest.mark.parametrize("name", STAGES)
def test_the_stages_continue_one_another(name):
    """Same network, codec and context: what one leaves, the next can start from."""
    first, config = load("webvi3d"), load(name)
    for key in ("model", "context", "schedule", "optimizer"):
        assert config[key].to_dict() == first[key].to_dict(), key
    assert config.codec.kind == first.codec.kind
    with pytest.raises(InputError, match=r"config\.init_from is empty"):
        settings.codec(config, settings.train_spec(config).unet)


@pytest.mark.parametrize(
    "name, size, views, references, batch",
    [
        ("webvi3d", 512, 5, (1,), 560),
        ("webvi3d_stage2", 512, 16, (1, 3), 228),
        ("superres", 1024, None, None, 114),
    ],
)
def test_the_stages_are_those_of_the_paper(name, size, views, references, batch):
    config = load(name)
    assert (config.data.image_size, config.batch_size) == (size, batch)
    if views is not None:
        assert (config.data.views, tuple(config.data.references)) == (views, references)
    steps = {"webvi3d": 120_000, "webvi3d_stage2": 200_000}
    assert config.num_steps == steps.get(name, config.num_steps)


def test_the_conditions_of_table_3_differ_in_nothing_else():
    flat = [load(name).to_dict() for name in TABLE3]
    assert [values.pop("condition") for values in flat] == ["posed", "unposed_t", "unposed_m"]
    assert flat[0] == flat[1] == flat[2]


@pytest.mark.parametrize("name", STAGES)
def test_a_step_of_each_stage_traces_at_full_size(name):
    """One sample from latents and pictures to the new state; nothing is computed."""
    config = load(name)
    config.batch_size = 1
    spec, mesh = settings.train_spec(config), make_mesh(config)
    vae = VaeConfig(**{k: x for k, x in config.codec.items() if k != "kind"})
    vision = ClipVisionConfig(dtype=config.context.dtype)
    frozen = Frozen(
        VaeCodec(abstract_vae(vae), vae),
        ImageContext(shape(77, 1024), abstract_clip_vision(vision), vision),
    )
    views, side = config.data.views, config.data.image_size
    batch = {
        "image": shape(1, views, side, side, 3),
        "mask": shape(1, views, side, side, 1),
        "is_reference": shape(1, views, dtype=bool),
        "frame": shape(1, views, dtype=jax.numpy.int32),
        "clip_pixels": shape(1, 224, 224, 3),
    }
    state = jax.eval_shape(
        lambda p: init_state(p, make_optimizer(spec.optimizer)), abstract_unet(spec.unet)
    )
    step = functools.partial(train_step, spec=spec, mesh=mesh)
    schedule, key = settings.noise_schedule(config), jax.random.key(0)
    after, metrics = jax.eval_shape(step, state, batch, frozen, schedule, key)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
        lambda x: (x.shape, x.dtype), state
    )
    assert metrics["loss"].shape == ()


def shape(*sizes, dtype=jax.numpy.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


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
        settings.evaluation(config)
        settings.codec(config, settings.train_spec(config).unet)
        make_mesh(config)
