"""Precomputed latents: what training reads is what it would have computed."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from click.testing import CliRunner
from conftest import moving_crop_clip

from see3d_jax.data import records
from see3d_jax.data.examples import ExampleSpec, LatentSpec
from see3d_jax.data.mixture import DataSource, Mixture
from see3d_jax.data.pipeline import training_batches
from see3d_jax.errors import InputError, WorkError
from see3d_jax.models.codec import DctCodec, VaeCodec, fingerprint
from see3d_jax.models.vae import VaeConfig
from see3d_jax.models.weights import init_vae
from tools import encode_latents

DCT = DctCodec(4, 8)


def run(*arguments):
    return CliRunner().invoke(encode_latents.app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def encoded(clip_folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("latents") / "clips"
    done = run("--input", clip_folder, "--output", output, "--dct", "4x8", "--size", "32x40")
    assert done.exit_code == 0, done.output or done.exception
    return output


def batches(folder, size=(32, 40), codec=DCT):
    spec = ExampleSpec(
        sizes=(size,), views=3, references=(1,), stride=(1, 2), hole_range=(0.1, 0.9),
        latents=LatentSpec(fingerprint(codec), codec.factor, codec.channels),
    )  # fmt: skip
    return training_batches(Mixture((DataSource(str(folder)),), 0), spec, 2, seed=0)


def test_training_reads_the_latents_it_would_compute(encoded):
    batch = next(batches(encoded))
    assert batch["latent"].shape == (2, 3, 8, 10, 8) and batch["latent"].dtype == np.float32
    expected = np.asarray(DCT.encode(batch["image"]))
    np.testing.assert_allclose(batch["latent"], expected, atol=2e-3 * np.abs(expected).max())


def test_everything_else_in_the_records_stays(encoded, clip_folder):
    before, after = (list(records.read_records(folder)) for folder in (clip_folder, encoded))
    for left, right in zip(before, after, strict=True):
        assert not left.latents and len(right.latents) == len(right.images)
        bare = dataclasses.replace(
            right, latents=(), latent_shape=(0, 0, 0), latent_size=(0, 0), latent_codec=""
        )
        assert records.encode(bare) == records.encode(left)


def test_tfds_still_opens_the_folder(encoded):
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(encoded)
    assert builder.info.splits["clips"].num_examples == 6
    example = builder.as_data_source(split="clips")[0]
    assert tuple(example["latent_shape"]) == (8, 10, 8) and len(example["latents"]) == 12


def test_a_second_run_does_nothing_and_a_killed_one_is_completed(encoded, clip_folder):
    shards = records.shard_paths(encoded)
    before = [shard.read_bytes() for shard in shards]
    shards[1].unlink()
    stamp = shards[0].stat().st_mtime_ns
    done = run("--input", clip_folder, "--output", encoded, "--dct", "4x8", "--size", "32x40")
    assert done.exit_code == 0 and "(1 of 1 shards)" in done.output
    assert [shard.read_bytes() for shard in shards] == before
    assert shards[0].stat().st_mtime_ns == stamp


def test_two_machines_share_the_work(clip_folder, encoded, tmp_path):
    for part in ("1/2", "0/2"):
        done = run(
            "--input", clip_folder, "--output", tmp_path / "out", "--dct", "4x8",
            "--size", "32x40", "--part", part,
        )  # fmt: skip
        assert done.exit_code == 0, done.exception
        assert (tmp_path / "out" / "dataset_info.json").exists() == (part == "0/2")
    for ours, theirs in zip(records.shard_paths(tmp_path / "out"), records.shard_paths(encoded)):
        assert ours.read_bytes() == theirs.read_bytes()


@pytest.mark.parametrize(
    "size, codec, message",
    [((32, 32), DCT, r"of \(32, 40\) pixels"), ((32, 40), DctCodec(4, 7), "channels=8")],
)
def test_latents_of_another_size_or_codec_are_refused(encoded, size, codec, message):
    with pytest.raises(InputError, match=f"{message}.*encode again with tools.encode_latents"):
        next(batches(encoded, size, codec))


def test_records_without_latents_say_how_to_make_them(clip_folder):
    with pytest.raises(InputError, match=r"no latents; make them with tools\.encode_latents"):
        next(batches(clip_folder))


def test_latents_of_several_shapes_are_refused():
    with pytest.raises(InputError, match=r"config\.data\.latents: .* one size"):
        ExampleSpec(((32, 32), (16, 32)), 3, (1,), (1, 2), (0.1, 0.9), 0.0, LatentSpec("", 4, 8))


def test_bad_records_are_left_out_and_named(tmp_path, capfd):
    broken = dataclasses.replace(moving_crop_clip("camera"), images=[b"\xff\xd8 no jpeg"] * 12)
    good = records.encode(moving_crop_clip("coffee"))
    records.write_shards([b"garbage", good, records.encode(broken)], tmp_path / "in")
    encode_latents.encode_shards(tmp_path / "in", tmp_path / "out", DCT, (32, 32))
    assert [clip.source for clip in records.read_records(tmp_path / "out")] == ["coffee.mp4"]
    errors = capfd.readouterr().err
    assert "record 0: " in errors and "record 2: a frame is no whole JPEG" in errors
    records.write_shards([b"garbage"], tmp_path / "bad")
    with pytest.raises(WorkError, match="none of its records"):
        encode_latents.encode_shards(tmp_path / "bad", tmp_path / "none", DCT, (32, 32))
    assert not list((tmp_path / "none").glob("*.array_record"))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--dct", "4x8", "--size", "30"], "multiples of the codec's factor 4"),
        (["--dct", "4x8", "--size", "wide"], "--size: want a number"),
        (["--dct", "4x99"], "--dct: channels"),
        (["--dct", "4x8", "--part", "2/2"], "--part"),
        ([], "--weights .* or --dct"),
        (["--weights", "nowhere"], "nowhere: no such folder"),
    ],
)
def test_a_mistake_is_named(clip_folder, tmp_path, arguments, message):
    done = run("--input", clip_folder, "--output", tmp_path / "out", *arguments)
    assert isinstance(done.exception, InputError)
    with pytest.raises(InputError, match=message):
        raise done.exception
    assert not (tmp_path / "out").exists()


def test_a_folder_of_something_else_is_not_written_to(encoded, clip_folder, tmp_path):
    (tmp_path / "file").write_text("mine")
    for output, message in ((tmp_path, "is not empty"), (encoded, "was made with")):
        done = run("--input", clip_folder, "--output", output, "--dct", "4x8", "--size", "64")
        assert isinstance(done.exception, InputError) and message in str(done.exception)


def test_the_autoencoder_of_converted_weights_makes_the_same_latents(clip_folder, tmp_path):
    config = VaeConfig(block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4)
    codec = VaeCodec(init_vae(config, 0), config)
    encode_latents.encode_shards(clip_folder, tmp_path / "out", codec, (16, 16), batch=5)
    batch = next(batches(tmp_path / "out", (16, 16), codec))
    expected = np.asarray(codec.encode(batch["image"]))
    np.testing.assert_allclose(batch["latent"], expected, atol=2e-3 * np.abs(expected).max())
    other = VaeCodec(jax.tree.map(lambda leaf: leaf * 1.01, codec.params), config)
    assert fingerprint(other) != fingerprint(codec)
