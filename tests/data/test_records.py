"""Records: what goes into a shard comes out of it, and anything else is refused by name."""

from __future__ import annotations

import dataclasses
import io

import numpy as np
import pytest
from conftest import moving_crop_clip
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from see3d_jax.data import records
from see3d_jax.errors import InputError


def assert_same_record(left: records.ClipRecord, right: records.ClipRecord) -> None:
    for field in dataclasses.fields(records.ClipRecord):
        a, b = getattr(left, field.name), getattr(right, field.name)
        if field.name in ("fps", "depth_unit"):
            assert np.float32(a) == np.float32(b)
        elif isinstance(a, np.ndarray):
            np.testing.assert_array_equal(np.asarray(a, np.float32), b)
            assert b.dtype == np.float32
        elif field.name in ("images", "depth", "latents"):
            assert [bytes(item) for item in a] == list(b)
        else:
            assert a == b, field.name


def posed_clip(frames: int) -> records.ClipRecord:
    rng = np.random.default_rng(frames)
    depth = rng.uniform(0.5, 20.0, (frames, 24, 32))
    return dataclasses.replace(
        moving_crop_clip("coffee", frames, 24, 32),
        depth=[records.encode_depth(d, 1e-3) for d in depth],
        intrinsics=np.tile(np.diag([30.0, 30.0, 1.0]).astype(np.float32), (frames, 1, 1)),
        world_to_camera=rng.normal(size=(frames, 4, 4)).astype(np.float32),
    )


@pytest.mark.parametrize("record", [moving_crop_clip("astronaut"), posed_clip(3)], ids=str)
def test_a_record_survives_the_round_trip(record):
    read = records.decode(records.encode(record))
    assert_same_record(record, read)
    assert read.posed == record.posed
    assert records.decode_image(read.images[0]).shape == (record.height, record.width, 3)


@settings(max_examples=25, deadline=None)
@given(
    clip_id=st.text(min_size=1, max_size=20).filter(lambda text: "\x00" not in text),
    source=st.text(max_size=40).filter(lambda text: "\x00" not in text),
    fps=st.floats(0, 240, width=32),
    frames=st.integers(2, 5),
)
def test_any_text_and_any_number_of_frames_survive(clip_id, source, fps, frames):
    record = dataclasses.replace(
        moving_crop_clip("camera", frames, 8, 12), clip_id=clip_id, source=source, fps=fps
    )
    assert_same_record(record, records.decode(records.encode(record)))


def test_the_same_record_gives_the_same_bytes():
    assert records.encode(posed_clip(3)) == records.encode(posed_clip(3))


def test_records_from_before_there_were_latents_are_read():
    from tensorflow_datasets.proto import tf_example_pb2

    stored = tf_example_pb2.Example.FromString(records.encode(posed_clip(3)))
    for name in ("latents", "latent_shape", "latent_size", "latent_codec"):
        stored.features.feature.pop(name, None)
    assert_same_record(posed_clip(3), records.decode(stored.SerializeToString()))


def test_latents_survive_in_half_precision():
    latents = np.random.default_rng(0).normal(size=(3, 2, 4, 5)).astype(np.float32)
    clip = dataclasses.replace(
        moving_crop_clip("coffee", 3), latents=[records.encode_latent(x) for x in latents],
        latent_shape=(2, 4, 5), latent_size=(16, 32), latent_codec="a codec",
    )  # fmt: skip
    read = records.decode(records.encode(clip))
    assert_same_record(clip, read)
    np.testing.assert_array_equal(read.latent(1), latents[1].astype(np.float16))
    assert read.latent(1).dtype == np.float32


def test_an_unknown_version_is_named_and_explained(monkeypatch):
    monkeypatch.setattr(records, "SCHEMA_VERSION", 99)
    newer = records.encode(moving_crop_clip("coffee", 2))
    monkeypatch.undo()
    with pytest.raises(InputError, match=r"clips\[7\].*version 99.*curate again"):
        records.decode(newer, "clips[7]")


@pytest.mark.parametrize("garbage", [b"", b"hello", b"\x00" * 1000, bytes(range(256)) * 9])
def test_foreign_bytes_are_refused_in_one_line(garbage):
    with pytest.raises(InputError, match="shard 3: not a see3d_jax clip record"):
        records.decode(garbage, "shard 3")


@settings(max_examples=40, deadline=None)
@given(cut=st.floats(0.01, 0.99))
def test_a_cut_off_record_is_never_taken_for_a_whole_one(cut):
    whole = records.encode(moving_crop_clip("chelsea", 3, 16, 16))
    with pytest.raises(InputError):
        records.decode(whole[: int(cut * len(whole))])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"images": [b"x"], "timestamps": np.zeros(1)}, "at least 2 frames"),
        ({"timestamps": np.zeros(5)}, "12 images but 5 timestamps"),
        ({"intrinsics": np.zeros((3, 3, 3))}, "intrinsics must have 0 or 12 entries"),
    ],
)
def test_inconsistent_records_cannot_be_made(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(moving_crop_clip("coffee"), **change)


def test_depth_keeps_its_unit_and_marks_what_it_cannot_hold():
    depth = np.array([[0.5, 1.2345, np.inf], [np.nan, -1.0, 70.0]], np.float32)
    read = records.decode_depth(records.encode_depth(depth, 1e-3), 1e-3)
    np.testing.assert_allclose(read[0, :2], depth[0, :2], atol=0.5e-3 + 1e-6)
    assert (read[0, 2], *read[1]) == (0.0, 0.0, 0.0, 0.0)  # no hit, or too far for 16 bits


def test_shards_hold_every_record_once_and_replace_an_older_set(tmp_path):
    clips = [dataclasses.replace(moving_crop_clip("coffee", 2), clip_id=str(i)) for i in range(5)]
    encoded = [records.encode(clip) for clip in clips]
    records.write_shards(encoded, tmp_path, num_shards=4)
    paths = records.write_shards(encoded, tmp_path, num_shards=2)
    assert records.shard_paths(tmp_path) == paths
    assert sorted(clip.clip_id for clip in records.read_records(tmp_path)) == list("01234")
    first = [path.read_bytes() for path in paths]
    records.write_shards(encoded, tmp_path, num_shards=2)
    assert [path.read_bytes() for path in paths] == first
    assert not list(tmp_path.glob(".*")), "temporary files left behind"


def test_tfds_opens_the_same_folder(clip_folder):
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(clip_folder)
    assert builder.info.splits["clips"].num_examples == 6
    example = builder.as_data_source(split="clips")[0]
    ours = next(iter(records.read_records(clip_folder)))
    assert example["clip_id"].decode() == ours.clip_id
    np.testing.assert_array_equal(
        example["images"][0], np.asarray(Image.open(io.BytesIO(ours.images[0])))
    )


@pytest.mark.parametrize("make", ["missing", "empty"])
def test_a_folder_without_shards_says_how_to_make_some(tmp_path, make):
    folder = tmp_path / make
    if make == "empty":
        folder.mkdir()
    with pytest.raises(InputError, match=make):
        records.shard_paths(folder)


def test_the_same_record_gives_the_same_bytes_in_every_process(tmp_path):
    """Protobuf maps have no order of their own; a rerun must still write the same shards."""
    import subprocess
    import sys

    code = (
        "import hashlib, numpy as np; from see3d_jax.data import records as r;"
        "image = r.encode_jpeg(np.zeros((8, 8, 3), np.uint8));"
        "clip = r.ClipRecord('id', 'source', 1.0, np.arange(2.0), [image] * 2, 8, 8);"
        "print(hashlib.sha256(r.encode(clip)).hexdigest())"
    )
    digests = {
        subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout
        for _ in range(3)
    }
    assert len(digests) == 1
