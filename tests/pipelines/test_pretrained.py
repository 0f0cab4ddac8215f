"""Released weights, taken through the converter, ready to sample from."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import synthetic_scene
from weight_fixtures import see3d_release

from see3d_jax.errors import InputError
from see3d_jax.pipelines import pretrained
from see3d_jax.pipelines.generation import generate
from see3d_jax.pipelines.pretrained import load_model
from tools import convert_see3d


@pytest.fixture(scope="module")
def scene(tmp_path_factory) -> Path:
    return synthetic_scene(tmp_path_factory.mktemp("synthetic"), 4, 48, 32, supersample=1)


def convert(published: Path, output: Path) -> Path:
    arguments = ["--input", str(published), "--output", str(output)]
    result = CliRunner().invoke(convert_see3d.app, arguments)
    assert result.exit_code == 0, result.output
    return output


@pytest.fixture(scope="module")
def release(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("release")
    see3d_release(folder / "published")
    return convert(folder / "published", folder / "converted")


def test_one_reference_takes_the_single_view_model_and_more_the_sparse_one(release):
    assert load_model(release).name == "released UNet 'single'"
    assert load_model(release, references=3).name == "released UNet 'sparse'"
    model = load_model(release, unet="SR")
    assert (model.name, model.sampling.weight_form) == ("released UNet 'SR'", "clean")
    assert (model.sampling.guidance, model.image_size, model.size_multiple) == (2.0, 512, 4)


def test_the_official_sampler_takes_the_official_quirks_along(release):
    plain, official = load_model(release), load_model(release, sampler="official")
    assert (plain.codec.config.tile_size, official.codec.config.tile_size) == (None, 32)
    assert official.sampling.timesteps == "official"
    picture = np.arange(3 * 40 * 30, dtype=np.uint8).reshape(40, 30, 3)
    contexts = [np.asarray(model.context(picture, 2)) for model in (plain, official)]
    assert contexts[0].shape == (1, 2, 77, 16)
    assert (contexts[0] != contexts[1]).any()  # dark bytes come out one lower officially


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"unet": "large"}, "has no UNet 'large'"),
        ({"step": 3}, "no training steps"),
        ({"sampler": "euler"}, "--sampler euler: expected one of ddim, fast, official"),
    ],
)
def test_what_released_weights_do_not_have_is_refused(release, options, message):
    with pytest.raises(InputError, match=message):
        load_model(release, **options)


def test_a_prompt_changes_the_context_and_no_words_change_nothing(shared, tmp_path):
    weights = convert(shared / "goldens/release_tiny", tmp_path / "weights")
    picture = np.full((32, 32, 3), 99, np.uint8)
    plain, empty, words = (
        np.asarray(load_model(weights, prompt=prompt).context(picture, 1))
        for prompt in (None, "", "a wooden chair by the window")
    )
    np.testing.assert_array_equal(plain, empty)
    assert np.isfinite(words).all() and (words != plain).any()


def test_a_model_without_a_text_tower_takes_no_prompt(tmp_path, monkeypatch):
    model = SimpleNamespace(context_encoder=None)
    monkeypatch.setattr(pretrained, "_trained_model", lambda *_: model)
    assert load_model(tmp_path) is model
    with pytest.raises(InputError, match=r"--prompt: .* without CLIP's text tower"):
        load_model(tmp_path, prompt="a chair")


def test_published_weights_are_to_be_converted_first(release, tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(InputError, match=r"tools\.convert_see3d --input"):
        load_model(tmp_path)


@pytest.mark.parametrize("sampler", ["fast", pytest.param("official", marks=pytest.mark.slow)])
def test_views_are_generated_from_the_official_tiny_release(shared, tmp_path, scene, sampler):
    weights = convert(shared / "goldens/release_tiny", tmp_path / "weights")
    result = generate(
        scene, trajectory=str(scene / "transforms.json"), checkpoint=weights, size=64,
        steps=2, sampler=sampler, views=2,
    )  # fmt: skip
    assert result.views.shape[0] == 2 and result.views.shape[1] % 16 == 0
    assert result.run["model"] == "released UNet 'single'" and result.run["guidance"] == 2.0
    assert json.dumps(result.run)
    holes = result.generated[~result.masks].astype(float)
    assert 20 < holes.std() < 120  # a picture, not a constant and not saturated noise
