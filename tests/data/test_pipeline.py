"""The input job: the same batches for the same seed, also after a resume and past bad clips."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from conftest import moving_crop_clip
from hypothesis import given, settings
from hypothesis import strategies as st

from see3d_jax.data import pipeline, records, transforms
from see3d_jax.errors import InputError

SPEC = pipeline.ExampleSpec(
    image_size=32, views=4, references=(1, 2), stride=(1, 3), hole_range=(0.1, 0.9)
)


def batches_of(folder, seed=0, **options):
    source = pipeline.ClipSource(folder, pipeline.SkippedClips())
    return iter(pipeline.training_batches(source, SPEC, batch_size=3, seed=seed, **options))


def assert_same_batch(left, right):
    assert left.keys() == right.keys()
    for key in left:
        np.testing.assert_array_equal(left[key], right[key], err_msg=key)


def test_a_batch_holds_what_training_expects(clip_folder):
    batch = next(batches_of(clip_folder))
    assert batch["image"].shape == (3, 4, 32, 32, 3) and batch["image"].dtype == np.float32
    assert batch["mask"].shape == (3, 4, 32, 32, 1) and batch["mask"].dtype == np.float32
    assert -1.0 <= batch["image"].min() < -0.5 and 0.5 < batch["image"].max() <= 1.0
    references = batch["is_reference"].sum(1)
    assert set(references) <= {1, 2}
    for example in range(3):
        assert batch["is_reference"][example, : references[example]].all(), "references come first"
        known = batch["mask"][example].mean((1, 2, 3))
        assert (known[: references[example]] == 1).all() and (
            known[references[example] :] < 1
        ).all()
        assert len(set(batch["frame"][example])) == 4, "four different frames"


def test_views_are_the_frames_they_claim_to_be(clip_folder):
    record = next(iter(records.read_records(clip_folder)))
    example = pipeline.make_example(record, np.random.default_rng(5), SPEC)
    for view, frame in enumerate(example["frame"]):
        expected = transforms.decode_square(record.images[frame], 32)
        np.testing.assert_array_equal(example["image"][view], transforms.to_model_range(expected))


def test_batches_repeat_with_the_seed_at_any_number_of_threads(clip_folder):
    one, four, other = (
        batches_of(clip_folder, seed=1, threads=1),
        batches_of(clip_folder, seed=1, threads=4),
        batches_of(clip_folder, seed=2),
    )
    for _ in range(4):
        batch = next(one)
        assert_same_batch(batch, next(four))
        assert (batch["image"] != next(other)["image"]).any()


def test_clips_look_different_in_every_epoch(clip_folder):
    iterator = batches_of(clip_folder)  # 6 clips, batches of 3: an epoch is two batches
    frames = [np.sort(next(iterator)["frame"].ravel()).tolist() for _ in range(8)]
    assert len({str(f) for f in frames}) > 4


def test_resuming_from_the_saved_position_continues_the_same_stream(clip_folder):
    straight = batches_of(clip_folder)
    for _ in range(3):
        next(straight)
    position = json.loads(json.dumps(straight.get_state()))
    resumed = batches_of(clip_folder)
    resumed.set_state(position)
    for _ in range(3):
        assert_same_batch(next(straight), next(resumed))


def write_with_bad_records(folder):
    good = [records.encode(moving_crop_clip(photo)) for photo in ("astronaut", "coffee", "rocket")]
    short = records.encode(moving_crop_clip("chelsea", frames=3))
    broken = dataclasses.replace(moving_crop_clip("camera"), images=[b"\xff\xd8 no jpeg"] * 12)
    records.write_shards([*good, b"garbage", short, records.encode(broken)], folder)


def test_bad_clips_are_skipped_counted_and_named(tmp_path):
    write_with_bad_records(tmp_path)
    skipped = pipeline.SkippedClips()
    source = pipeline.ClipSource(tmp_path, skipped)
    iterator = iter(pipeline.training_batches(source, SPEC, 3, seed=0))
    for _ in range(6):
        assert next(iterator)["image"].shape == (3, 4, 32, 32, 3)
    bad = {name.replace(str(tmp_path), ""): reason for name, reason in skipped.reasons.items()}
    assert set(bad) == {
        " record 3",
        "clip camera-0 of camera.mp4",
        "clip chelsea-0 of chelsea.mp4",
    }
    assert "not a see3d_jax clip record" in bad[" record 3"]
    assert "3 frames, 4 views" in bad["clip chelsea-0 of chelsea.mp4"]


def test_resuming_past_bad_clips_is_exact_too(tmp_path):
    write_with_bad_records(tmp_path)
    straight = batches_of(tmp_path)
    for _ in range(2):
        next(straight)
    position = straight.get_state()
    resumed = batches_of(tmp_path)
    resumed.set_state(position)
    for _ in range(3):
        assert_same_batch(next(straight), next(resumed))


def test_a_record_damaged_on_disk_is_skipped(tmp_path):
    clips = [moving_crop_clip(photo, 12, 240, 320) for photo in ("astronaut", "coffee", "rocket")]
    (path,) = records.write_shards([records.encode(clip) for clip in clips], tmp_path)
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 3 : len(raw) // 3 + 64] = b"x" * 64
    path.write_bytes(raw)
    skipped = pipeline.SkippedClips()
    source = pipeline.ClipSource(tmp_path, skipped)
    assert [source[i] is None for i in range(3)].count(True) == 1
    assert "corrupted" in str(skipped.reasons).lower()


@pytest.mark.parametrize("content", [b"", b"no shard" * 20_000], ids=["empty", "text"])
def test_a_broken_shard_is_named(tmp_path, clip_folder, content):
    shard = tmp_path / "clips-00000-of-00001.array_record"
    shard.write_bytes(content)
    with pytest.raises(InputError, match=r"clips-00000-of-00001\.array_record: not a readable"):
        pipeline.ClipSource(tmp_path, pipeline.SkippedClips())


def test_clips_that_are_all_too_short_are_refused_in_one_line(tmp_path):
    records.write_shards([records.encode(moving_crop_clip("coffee", frames=3))], tmp_path)
    source = pipeline.ClipSource(tmp_path, pipeline.SkippedClips())
    with pytest.raises(InputError, match=r"none of its 1 clips .*views=4.*has 3 frames"):
        pipeline.held_out_batch(source, SPEC, clips=2, seed=0)


def test_held_out_sources_never_reach_training(clip_folder):
    source = pipeline.ClipSource(clip_folder, pipeline.SkippedClips())
    batch, names = pipeline.held_out_batch(source, SPEC, clips=2, seed=0)
    again, _ = pipeline.held_out_batch(source, SPEC, clips=2, seed=0)
    assert_same_batch(batch, again)
    assert len(names) == 2 and batch["image"].shape[0] == 2
    kept = {source[i].source for i in range(len(source))} - names
    seen = set()
    for i in range(len(source)):
        example = pipeline._example_or_none(
            source[i], np.random.default_rng(0), SPEC, names, source.skipped
        )
        if example is not None:
            seen.add(source[i].source)
    assert seen == kept


def test_with_a_single_source_nothing_is_held_out(tmp_path):
    records.write_shards([records.encode(moving_crop_clip("coffee"))] * 3, tmp_path)
    source = pipeline.ClipSource(tmp_path, pipeline.SkippedClips())
    batch, names = pipeline.held_out_batch(source, SPEC, clips=2, seed=0)
    assert names == frozenset() and batch["image"].shape[0] == 1


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    frames=st.integers(2, 40),
    views=st.integers(2, 8),
    low=st.integers(1, 4),
    more=st.integers(0, 6),
)
def test_drawn_frames_are_distinct_evenly_spaced_and_inside_the_clip(
    seed, frames, views, low, more
):
    rng = np.random.default_rng(seed)
    if frames < views:
        with pytest.raises(ValueError, match="frames"):
            transforms.choose_frames(rng, frames, views, (low, low + more))
        return
    drawn = transforms.choose_frames(rng, frames, views, (low, low + more))
    steps = np.unique(np.diff(np.sort(drawn)))
    assert drawn.min() >= 0 and drawn.max() < frames and len(set(drawn)) == views
    assert len(steps) == 1 and 1 <= steps[0] <= low + more


@pytest.mark.parametrize("shape", [(72, 96), (96, 72), (40, 40), (480, 854)])
def test_crop_is_the_centre_square_whatever_the_shape(shape):
    height, width = shape
    image = np.zeros((height, width, 3), np.uint8)
    side = min(shape)
    top, left = (height - side) // 2, (width - side) // 2
    image[top : top + side, left : left + side] = (200, 60, 30)
    square = transforms.decode_square(records.encode_jpeg(image), 16)
    assert square.shape == (16, 16, 3)
    assert np.abs(square[2:-2, 2:-2].astype(int) - (200, 60, 30)).max() < 12


@pytest.mark.parametrize(
    "change, field",
    [
        ({"references": (0,)}, "references"),
        ({"references": (4,)}, "references"),
        ({"stride": (3, 1)}, "stride"),
        ({"hole_range": (0.2, 1.5)}, "hole_range"),
    ],
)
def test_impossible_settings_name_their_config_key(change, field):
    with pytest.raises(InputError, match=f"config.data.{field}"):
        dataclasses.replace(SPEC, **change)
