"""From published weights to a training step, and from one stage of training to the next."""

from __future__ import annotations

import json
import shutil

import jax
import ml_collections
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from weight_fixtures import (
    MVDREAM,
    VISION,
    component,
    ldm_checkpoint,
    see3d_release,
    small_files,
    tokenizer_folder,
)

from configs import tiny
from see3d_jax.errors import InputError
from see3d_jax.models.origins import complete_steps, find_release, read_average, read_run_config
from see3d_jax.models.release import load_release
from see3d_jax.pipelines.pretrained import load_model
from see3d_jax.training import loop, settings, sharding, step
from see3d_jax.training.state import init_state
from tools.weight_exports import export_training
from tools.weight_plans import convert_mvdream, convert_release

VOCABULARY = 49408  # the empty prompt consists of the last two tokens


@pytest.fixture(scope="module")
def mvdream(tmp_path_factory):
    """MVDream in small, converted: LDM checkpoint, tokenizer and image tower."""
    folder = tmp_path_factory.mktemp("mvdream")
    with pytest.MonkeyPatch.context() as patch:  # one level: compiles in a fraction of the time
        patch.setitem(MVDREAM, "channel_mult", [1])
        patch.setitem(MVDREAM, "attention_resolutions", [])
        state = ldm_checkpoint()
    words = np.random.default_rng(9).standard_normal((VOCABULARY, 16)).astype(np.float16)
    state["cond_stage_model.model.token_embedding.weight"] = words
    save_file(state, folder / "mvdream.safetensors")
    tokenizer_folder(folder / "tokenizer")
    component(folder / "clip", "image_encoder", VISION, "model.safetensors", 5, np.float32)
    small_files(folder / "clip", {"preprocessor_config.json": {"size": 28, "crop_size": 28}})
    convert_mvdream(
        folder / "mvdream.safetensors", folder / "weights", tokenizer=folder / "tokenizer",
        image_encoder=folder / "clip", head_dim=16,
    )  # fmt: skip
    return folder / "weights"


def config_of(origin, data="unused", **overrides):
    """configs/tiny.py with the architecture of the small weights: 16² images, 2 or 3 views."""
    config = tiny.get_config()
    config.objective.preconditioning = "none"  # as published weights were trained
    config.codec = ml_collections.ConfigDict({"kind": "vae", "slicing": True})
    config.model.in_channels, config.model.out_channels = 9, 4
    config.update_from_flattened_dict(
        {
            "init_from": str(origin),
            "batch_size": 2,
            "num_steps": 2,
            "checkpoint_every": 2,
            "sample_every": 0,
            "data.path": str(data),
            "data.image_size": 16,
            "data.views": 2,
            "data.references": (1,),
            "data.held_out": 2,
            "context.tokens": 77,
            "model.model_channels": 32,
            "model.channel_mult": (1,),
            "model.attention_strides": (),
            "model.head_dim": 16,
            "model.context_dim": 16,
            "model.norm_groups": 32,
            "optimizer.learning_rate": 1e-3,
            "optimizer.warmup_steps": 1,
            **overrides,
        }
    )
    return config.lock()


def unet_of(config):
    return settings.train_spec(config).unet


def differ(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return sum(not np.array_equal(x, y) for x, y in pairs)


@pytest.fixture(scope="module")
def first_stage(mvdream, clip_folder, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "first"
    # With the image context, so that pictures are prepared for CLIP on the way in.
    loop.train(config_of(mvdream, clip_folder, **{"context.image": True}), workdir)
    return workdir


def test_a_run_starts_from_the_converted_network_and_its_autoencoder(mvdream, first_stage):
    config = config_of(mvdream)
    release = load_release(mvdream)
    start = settings.initial_params(config, unet_of(config))
    assert differ(start, release.unet("mvdream")[1]) == 0
    assert not np.any(start["input_blocks"]["0"]["0"]["weight"][:, :, 4:])  # V_t and the mask
    codec = settings.frozen_networks(config, unet_of(config)).codec
    assert differ(codec.params, release.vae()[1]) == 0 and codec.config.slicing

    rows = [json.loads(line) for line in (first_stage / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == 2 and np.isfinite(losses).all()
    trained = read_average(first_stage, 2, unet_of(config))
    assert differ(trained, start) > 50


def test_a_stage_starts_from_the_average_of_the_one_before(mvdream, first_stage, clip_folder):
    config = config_of(first_stage, clip_folder, **{"data.views": 4, "data.references": (1, 3)})
    start = settings.initial_params(config, unet_of(config))
    assert differ(start, read_average(first_stage, 2, unet_of(config))) == 0
    assert find_release(str(first_stage)).folder == load_release(mvdream).folder
    codec = settings.frozen_networks(config, unet_of(config)).codec
    assert differ(codec.params, load_release(mvdream).vae()[1]) == 0


def test_a_step_with_the_image_context_of_the_weights(mvdream):
    config = config_of(mvdream, **{"context.image": True})
    spec = settings.train_spec(config)
    frozen = settings.frozen_networks(config, spec.unet)
    encoder = frozen.context_encoder
    assert encoder.text_states.shape == (77, 16) and encoder.preprocessing.crop == (28, 28)
    mesh = sharding.make_mesh(config)
    frozen = sharding.put_whole(frozen, sharding.state_shardings(frozen, mesh))
    optimizer = step.make_optimizer(spec.optimizer)
    start = init_state(settings.initial_params(config, spec.unet), optimizer)
    placement = sharding.state_shardings(start, mesh)
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.uniform(-1, 1, (2, 2, 16, 16, 3)).astype(np.float32),
        "mask": np.ones((2, 2, 16, 16, 1), np.float32),
        "is_reference": np.tile([True, False], (2, 1)),
        "frame": np.zeros((2, 2), np.int32),
    }
    losses = []
    for pixels in (rng.standard_normal((2, 28, 28, 3)), np.zeros((2, 28, 28, 3))):
        placed = sharding.put_batch(batch | {"clip_pixels": pixels.astype(np.float32)}, mesh)
        _, metrics = step.train_step(
            sharding.put_whole(start, placement), placed, frozen, settings.noise_schedule(config),
            jax.random.key(0), spec=spec, mesh=mesh,
        )  # fmt: skip
        losses.append(float(metrics["loss"]))
    assert np.isfinite(losses).all() and losses[0] != losses[1], "the picture makes no difference"


def test_half_precision_context_stays_close(mvdream):
    whole = settings.image_context(config_of(mvdream, **{"context.image": True}), _unet(16))
    half = settings.image_context(
        config_of(mvdream, **{"context.image": True, "context.dtype": "bfloat16"}), _unet(16)
    )
    pixels = np.random.default_rng(1).standard_normal((3, 28, 28, 3), np.float32)
    exact, close = whole.encode(pixels, 1), half.encode(pixels, 1)
    assert {x.dtype.name for x in jax.tree.leaves(half.vision_params)} == {"bfloat16", "float32"}
    assert 0 < np.abs(exact - close).max() < 0.05 * np.std(exact - whole.text_states) * 5


def _unet(context_dim):
    return unet_of(config_of("unused", **{"model.context_dim": context_dim}))


def test_what_was_trained_can_be_sampled_with_its_autoencoder_and_context(first_stage, mvdream):
    model = load_model(first_stage)
    assert differ(model.codec.params, load_release(mvdream).vae()[1]) == 0
    context = model.context(np.zeros((40, 40, 3), np.uint8), 2)
    assert context.shape == (1, 2, 77, 16) and np.isfinite(np.asarray(context)).all()


def test_a_run_of_an_older_release_is_refused_in_one_line(first_stage, tmp_path):
    workdir = shutil.copytree(first_stage, tmp_path / "old")
    values = read_run_config(workdir)
    del values["condition"]
    (workdir / "config.json").write_text(json.dumps(values))
    with pytest.raises(InputError, match=r"old/config\.json: does not describe a model.*condition"):
        load_model(workdir)


def test_a_trained_run_goes_back_to_pytorch_names(first_stage, mvdream, tmp_path):
    export_training(first_stage, tmp_path / "export")
    tensors = load_file(tmp_path / "export" / "diffusion_pytorch_model.safetensors")
    before = load_file(mvdream / "unet/mvdream/model.safetensors")
    assert tensors.keys() == before.keys()
    assert {name: x.shape for name, x in tensors.items()} == {
        name: x.shape for name, x in before.items()
    }


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"model.head_dim": 32}, r"UNet 'mvdream' has head_dim 16, config\.model\.head_dim is 32"),
        ({"model.channel_mult": (1, 1)}, r"has channel_mult \(1,\)"),
        ({"init_unet": "sparse"}, r"config\.init_unet: .* has no UNet 'sparse'; .*\['mvdream'\]"),
        ({"init_from": "nowhere"}, r"nowhere: no such training folder"),
        ({"init_from": "", "init_unet": "SR"}, r"config\.init_unet names a UNet, but"),
        ({"objective.preconditioning": "gaussian"}, r"'gaussian', but .* were trained with 'none'"),
    ],
)
def test_weights_that_do_not_fit_are_refused_before_they_are_read(mvdream, overrides, message):
    config = config_of(mvdream, **overrides)
    with pytest.raises(InputError, match=message):
        settings.check_origin(config, unet_of(config))


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"init_from": ""}, r"config\.codec\.kind is 'vae', but config\.init_from is empty"),
        ({"data.image_size": 15}, r"config\.data\.image_size: 15 is not a multiple of 2"),
        ({"context.image": True, "context.tokens": 5}, r"config\.context\.tokens .*\(77, 16\)"),
        ({"context.image": True, "init_from": ""}, r"config\.init_from is empty"),
    ],
)
def test_what_the_frozen_networks_cannot_do_is_named(mvdream, overrides, message):
    config = config_of(mvdream, **overrides)
    with pytest.raises(InputError, match=message):
        settings.frozen_networks(config, unet_of(config))


def test_a_release_of_several_networks_wants_one_named(tmp_path):
    see3d_release(tmp_path / "published")
    convert_release(tmp_path / "published", tmp_path / "weights", quiet=True)
    levels = {"model.channel_mult": (1, 2), "model.attention_strides": (1, 2)}
    config = config_of(tmp_path / "weights", **levels)
    with pytest.raises(InputError, match=r"config\.init_unet is empty.*'SR', 'single', 'sparse'"):
        settings.check_origin(config, unet_of(config))
    config = config_of(tmp_path / "weights", init_unet="sparse", **levels)
    chosen = settings.initial_params(config, unet_of(config))
    assert differ(chosen, load_release(tmp_path / "weights").unet("sparse")[1]) == 0


def test_an_earlier_run_that_cannot_be_continued_is_named(mvdream, first_stage, tmp_path):
    config = config_of(first_stage, init_unet="mvdream")
    with pytest.raises(InputError, match=r"training run and has one UNet"):
        settings.check_origin(config, unet_of(config))

    young = tmp_path / "young"
    young.mkdir()
    shutil.copy(first_stage / "config.json", young)
    config = config_of(young)
    with pytest.raises(InputError, match=r"young: has no complete checkpoint"):
        settings.check_origin(config, unet_of(config))

    values = read_run_config(first_stage)
    (young / "config.json").write_text(json.dumps(values | {"init_from": ""}))
    with pytest.raises(InputError, match=r"young: started from no converted weights"):
        settings.frozen_networks(config, unet_of(config))
    (young / "config.json").write_text(json.dumps(values | {"init_from": str(young)}))
    with pytest.raises(InputError, match=r"start from each other"):
        settings.frozen_networks(config, unet_of(config))
    (young / "config.json").write_text(json.dumps(values | {"codec": {"kind": "dct"}}))
    with pytest.raises(InputError, match=r"config\.codec is .*'vae'.* trained with .*'dct'"):
        settings.frozen_networks(config, unet_of(config))
    assert complete_steps(first_stage) == [2]


@pytest.mark.slow
def test_the_official_tiny_release_trains_a_step(shared, clip_folder, tmp_path):
    convert_release(shared / "goldens/release_tiny", tmp_path / "weights", quiet=True)
    config = config_of(
        tmp_path / "weights", clip_folder, init_unet="sparse", num_steps=1, checkpoint_every=1,
        **{"model.channel_mult": (1, 2), "model.attention_strides": (1, 2)},
    )  # fmt: skip
    loop.train(config, tmp_path / "run")
    assert complete_steps(tmp_path / "run") == [1]
