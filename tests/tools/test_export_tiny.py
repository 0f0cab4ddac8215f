"""A training run packed into two files, and what is sampled from them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from click.testing import CliRunner
from weight_fixtures import random_run

from see3d_jax.errors import InputError
from see3d_jax.models import origins, packed
from see3d_jax.pipelines import pretrained
from see3d_jax.pipelines.group_sampling import sample_groups
from see3d_jax.pipelines.pretrained import load_model
from tools import export_tiny


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return random_run(tmp_path_factory.mktemp("run") / "tiny")


def export(run: Path, output: Path, *more: str):
    arguments = ["--workdir", str(run), "--output", str(output), *more]
    return CliRunner().invoke(export_tiny.app, arguments)


@pytest.fixture(scope="module")
def folder(run, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("packed") / "tiny"
    assert export(run, output).exit_code == 0
    return output


def test_a_packed_model_is_the_run_in_half_precision(run, folder) -> None:
    whole, small = load_model(run), load_model(folder)
    for name in ("unet", "codec", "image_size", "views", "sampling", "preconditioning",
                 "context_tokens", "official"):  # fmt: skip
        assert getattr(small, name) == getattr(whole, name), name
    assert (small.sampling.num_steps, small.sampling.guidance) == (3, 0.5)
    for a, b in zip(jax.tree.leaves(small.schedule), jax.tree.leaves(whole.schedule), strict=True):
        np.testing.assert_array_equal(a, b)
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(a, np.asarray(b).astype(np.float16)),
        jax.tree.map(np.asarray, small.params), whole.params,
    )  # fmt: skip
    picture = np.arange(32 * 32 * 3, dtype=np.uint8).reshape(1, 32, 32, 3)
    masks = np.zeros((2, 32, 32), bool)
    views = [
        sample_groups(model, picture, np.repeat(picture, 2, 0), masks, 7)
        for model in (whole, small, small)
    ]
    np.testing.assert_array_equal(views[1], views[2])
    assert np.abs(views[0].astype(int) - views[1]).max() <= 4  # half precision, no other model


def test_training_can_go_on_from_a_packed_model(folder) -> None:
    model = load_model(folder)
    wanted = dataclasses.replace(model.unet, remat=True)
    origins.check_preconditioning(str(folder), model.preconditioning)
    jax.tree.map(
        np.testing.assert_array_equal, origins.initial_unet(str(folder), "", wanted), model.params
    )
    with pytest.raises(InputError, match=r"its UNet has num_res_blocks 1, .* is 2: they must"):
        origins.check_origin(str(folder), "", dataclasses.replace(wanted, num_res_blocks=2))
    with pytest.raises(InputError, match=r"trained with 'gaussian'; they must"):
        origins.check_preconditioning(str(folder), "filled")
    with pytest.raises(InputError, match=r"trained with \{'kind': 'dct', .* they must agree"):
        origins.load_codec({"kind": "dct", "factor": 2, "channels": 3}, str(folder))
    with pytest.raises(InputError, match=r"started from no converted weights"):
        origins.find_release(str(folder))


def test_the_same_run_gives_the_same_bytes_and_no_name_of_a_folder(run, folder, tmp_path) -> None:
    again = tmp_path / "again"
    for _ in range(2):  # the second time over the first
        assert export(run, again, "--data", "clips in words").exit_code == 0
    weights = (again / "model.safetensors").read_bytes()
    assert weights == (folder / "model.safetensors").read_bytes()
    assert sorted(p.name for p in again.iterdir()) == ["config.json", "model.safetensors"]
    training = json.loads((folder / "config.json").read_text())["training"]
    assert (training["steps"], training["data"]) == (5, "clips")
    assert "somewhere" not in (folder / "config.json").read_text()
    assert json.loads((again / "config.json").read_text())["training"]["data"] == "clips in words"


def test_what_cannot_be_packed_is_refused(run, tmp_path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/file").touch()
    error = export(run, tmp_path / "mine").exception
    assert isinstance(error, InputError) and "something else" in str(error)
    for change, message in (
        ({"codec": {"kind": "vae"}}, "an autoencoder"),
        ({"context": {"image": True}}, "CLIP"),
    ):
        config = json.loads((run / "config.json").read_text())
        params = load_model(run).params
        with pytest.raises(InputError, match=message):
            packed.pack({**config, **change} if "codec" in change else
                        {**config, "context": {**config["context"], **change["context"]}},
                        params, {}, "run")  # fmt: skip
    config = json.loads((run / "config.json").read_text())
    huge = jax.tree.map(lambda x: x + 1e6, load_model(run).params)
    with pytest.raises(InputError, match="float16"):
        packed.pack(config, huge, {}, "run")


def test_a_damaged_packed_model_is_named(folder, tmp_path) -> None:
    for name, text, message in (
        ("config.json", '{"format": "other"}', "is not of the format"),
        ("model.safetensors", "short", "no whole safetensors file"),
    ):
        broken = tmp_path / name
        broken.mkdir()
        for file in folder.iterdir():
            (broken / file.name).write_bytes(file.read_bytes())
        (broken / name).write_text(text)
        with pytest.raises(InputError, match=message):
            load_model(broken)
    with pytest.raises(InputError, match="no training steps"):
        load_model(folder, step=3)


def test_without_a_checkpoint_the_weights_of_the_package_are_taken(
    folder, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(pretrained, "EMBEDDED", folder)
    assert load_model(None).name == "the small model inside the package, training step 5"
    monkeypatch.setattr(pretrained, "EMBEDDED", tmp_path / "absent")
    with pytest.raises(InputError, match="give --checkpoint"):
        load_model(None)
