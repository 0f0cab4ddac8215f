"""The input job: the same batches for the same seed, also after a resume and past bad clips."""

from __future__ import annotations

import contextlib
import dataclasses
import json

import numpy as np
import pytest
from conftest import moving_crop_clip
from hypothesis import given, settings
from hypothesis import strategies as st

from see3d_jax.data import held_out as held_out_module
from see3d_jax.data import records, transforms
from see3d_jax.data.examples import ExampleSpec, empty_batch, fill_example
from see3d_jax.data.held_out import held_out_batch
from see3d_jax.data.mixture import DataSource, Mixture, SkippedClips
from see3d_jax.data.pipeline import BatchMaker, training_batches
from see3d_jax.errors import InputError

SPEC = ExampleSpec(
    sizes=((32, 32),), views=4, references=(1, 2), stride=(1, 3), hole_range=(0.1, 0.9)
)


def mixture_of(*folders, seed=0):
    return Mixture(tuple(DataSource(str(folder)) for folder in folders), seed)


def batches_of(folder, seed=0, spec=SPEC, batch_size=3, **options):
    return training_batches(mixture_of(folder, seed=seed), spec, batch_size, seed, **options)


def assert_same_batch(left, right):
    assert left.keys() == right.keys()
    for key in left:
        np.testing.assert_array_equal(left[key], right[key], err_msg=key)


def test_a_batch_holds_what_training_expects(clip_folder):
    batch = next(batches_of(clip_folder))
    assert batch.keys() == {"image", "mask", "is_reference", "frame"}
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
    row = {key: value[0] for key, value in empty_batch(SPEC, 1, (32, 32), False).items()}
    fill_example(row, record, np.random.default_rng(5), SPEC)
    crop = transforms.centre_crop((record.height, record.width), (32, 32))
    for view, frame in enumerate(row["frame"]):
        expected = transforms.to_model_range(crop.image(record.images[frame]))
        np.testing.assert_array_equal(row["image"][view], expected)


@settings(max_examples=20)
@given(step=st.integers(0, 10**6), rows=st.permutations(range(6)), cut=st.integers(1, 5))
def test_a_row_depends_on_its_position_alone(clip_folder, step, rows, cut):
    """Row i of step n is row n·B + i of one long stream, for any batch size and process."""
    mixture = mixture_of(clip_folder)
    whole = BatchMaker(mixture, SPEC, 6, 0)(step)
    for part in (tuple(rows[:cut]), tuple(rows[cut:])):
        made = BatchMaker(mixture, SPEC, 6, 0, rows=part)(step)
        for key in ("image", "mask", "frame"):
            np.testing.assert_array_equal(made[key], whole[key][list(part)])
    pair = BatchMaker(mixture, SPEC, 2, 0)(3 * step + 1)  # rows 6n + 2 and 6n + 3
    np.testing.assert_array_equal(pair["image"], whole["image"][2:4])


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


def test_every_clip_comes_once_per_epoch(clip_folder):
    maker = BatchMaker(mixture_of(clip_folder), SPEC, 6, 0)
    for epoch in range(3):
        first_views = maker(epoch)["image"][:, :, :4, :4].reshape(6, -1)
        assert len(np.unique(first_views, axis=0)) == 6


def test_clips_look_different_in_every_epoch(clip_folder):
    iterator = batches_of(clip_folder)  # 6 clips, batches of 3: an epoch is two batches
    frames = [np.sort(next(iterator)["frame"].ravel()).tolist() for _ in range(8)]
    assert len({str(f) for f in frames}) > 4


@pytest.mark.parametrize("options", [{}, {"threads": 4}], ids=str)
def test_resuming_from_the_saved_position_continues_the_same_stream(clip_folder, options):
    straight = batches_of(clip_folder)
    for _ in range(3):
        next(straight)
    position = json.loads(json.dumps(straight.get_state()))
    resumed = batches_of(clip_folder, **options)
    resumed.set_state(position)
    for _ in range(3):
        assert_same_batch(next(straight), next(resumed))


def write_with_bad_records(folder):
    good = [records.encode(moving_crop_clip(photo)) for photo in ("astronaut", "coffee", "rocket")]
    short = records.encode(moving_crop_clip("chelsea", frames=3))
    broken = dataclasses.replace(moving_crop_clip("camera"), images=[b"\xff\xd8 no jpeg"] * 12)
    records.write_shards([*good, b"garbage", short, records.encode(broken)], folder)


BAD = {" record 3", "clip camera-0 of camera.mp4", "clip chelsea-0 of chelsea.mp4"}


def names(skipped, folder):
    return {name.replace(str(folder), "") for name in skipped.reasons}


def test_bad_clips_are_replaced_counted_and_named(tmp_path):
    write_with_bad_records(tmp_path)
    iterator = batches_of(tmp_path)
    for _ in range(6):
        assert next(iterator)["image"].shape == (3, 4, 32, 32, 3)
    assert names(iterator.skipped, tmp_path) == BAD
    reasons = iterator.skipped.reasons
    assert "not a see3d_jax clip record" in reasons[f"{tmp_path} record 3"]
    assert "3 frames, 4 views" in reasons["clip chelsea-0 of chelsea.mp4"]
    assert "no whole JPEG" in reasons["clip camera-0 of camera.mp4"]


def test_worker_processes_make_the_same_batches_and_report_bad_clips(tmp_path):
    """Also when a run that used none is continued with two."""
    write_with_bad_records(tmp_path)
    threads = batches_of(tmp_path)
    with contextlib.closing(batches_of(tmp_path, workers=2)) as workers:
        for _ in range(4):
            assert_same_batch(next(threads), next(workers))
        assert workers.skipped.reasons == threads.skipped.reasons
        assert len(workers.skipped) > 0
        position = json.loads(json.dumps(threads.get_state()))
        assert workers.get_state() == position
        for _ in range(3):
            next(workers)
        workers.set_state(position)
        for _ in range(3):
            assert_same_batch(next(threads), next(workers))


@pytest.mark.parametrize("workers", [0, 1])
def test_data_without_any_usable_clip_ends_in_one_line(tmp_path, workers):
    short = [moving_crop_clip(photo, frames=3) for photo in ("coffee", "rocket")]
    records.write_shards([records.encode(clip) for clip in short], tmp_path)
    with contextlib.closing(batches_of(tmp_path, workers=workers)) as iterator:
        with pytest.raises(InputError, match=r"config\.data: .*views=4.*3 frames, 4 views"):
            next(iterator)


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
    iterator = batches_of(tmp_path)
    for _ in range(3):
        next(iterator)
    assert len(iterator.skipped) == 1
    assert "corrupted" in str(iterator.skipped.reasons).lower()


@pytest.mark.parametrize("content", [b"", b"no shard" * 20_000], ids=["empty", "text"])
def test_a_broken_shard_is_named(tmp_path, clip_folder, content):
    shard = tmp_path / "clips-00000-of-00001.array_record"
    shard.write_bytes(content)
    with pytest.raises(InputError, match=r"clips-00000-of-00001\.array_record: not a readable"):
        mixture_of(tmp_path)


def hold_out(folder, clips, spec=SPEC):
    return held_out_batch(mixture_of(folder), spec, clips, 0, SkippedClips())


def test_clips_that_are_all_too_short_are_refused_in_one_line(tmp_path):
    records.write_shards([records.encode(moving_crop_clip("coffee", frames=3))], tmp_path)
    with pytest.raises(InputError, match=r"none of its 1 clips .*views=4.*has 3 frames"):
        hold_out(tmp_path, clips=2)


def test_held_out_sources_never_reach_training(clip_folder):
    batch, held_out = hold_out(clip_folder, clips=2)
    assert_same_batch(batch, hold_out(clip_folder, clips=2)[0])
    assert len(held_out.names) == 2 and batch["image"].shape[0] == 2
    folder = mixture_of(clip_folder).folders[0]
    kept = {folder[i].source for i in range(len(folder))} - set(held_out.names)
    assert len(kept) == 4 and not any(source in held_out for source in kept)
    assert all(source in held_out for source in held_out.names)
    maker = BatchMaker(mixture_of(clip_folder), SPEC, 3, 0, held_out)
    monitored = {key: value[0] for key, value in empty_batch(SPEC, 1, (32, 32), False).items()}
    seen = set()
    for position in range(24):
        maker._fill(monitored, position)
        seen.add(monitored["image"][0, :4, :4].tobytes())
    assert maker._fill(monitored, 0) == [], "held-out clips are not bad clips"


def test_a_source_keeps_its_side_when_more_data_comes(tmp_path):
    """Held-out sources are the lowest in an order that other sources do not change."""
    photos = ("astronaut", "chelsea", "coffee", "rocket")
    encoded = [records.encode(moving_crop_clip(photo, 6)) for photo in photos]
    records.write_shards(encoded[:3], tmp_path / "few")
    records.write_shards(encoded, tmp_path / "more")
    few, more = (hold_out(tmp_path / name, clips=2)[1].names for name in ("few", "more"))
    assert set(more) - {"rocket.mp4"} <= set(few)


def test_a_large_data_set_is_sampled_and_the_rest_follows_the_rule(clip_folder, monkeypatch):
    monkeypatch.setattr(held_out_module, "SAMPLE", 3)
    _, held_out = hold_out(clip_folder, clips=1)
    folder = mixture_of(clip_folder).folders[0]
    sides = [folder[i].source in held_out for i in range(len(folder))]
    assert 1 <= sum(sides) < 6


def test_with_a_single_source_nothing_is_held_out(tmp_path):
    records.write_shards([records.encode(moving_crop_clip("coffee"))] * 3, tmp_path)
    batch, held_out = hold_out(tmp_path, clips=2)
    assert held_out.names == () and batch["image"].shape[0] == 1
    assert "coffee.mp4" not in held_out


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
    square = transforms.centre_crop(shape, (16, 16)).image(records.encode_jpeg(image))
    assert square.shape == (16, 16, 3)
    assert np.abs(square[2:-2, 2:-2].astype(int) - (200, 60, 30)).max() < 12


@pytest.mark.parametrize(
    "change, field",
    [
        ({"references": (0,)}, "references"),
        ({"references": (4,)}, "references"),
        ({"stride": (3, 1)}, "stride"),
        ({"hole_range": (0.2, 1.5)}, "hole_range"),
        ({"depth_noise": -0.1}, "depth_noise"),
        ({"sizes": ()}, "aspects"),
    ],
)
def test_impossible_settings_name_their_config_key(change, field):
    with pytest.raises(InputError, match=f"config.data.{field}"):
        dataclasses.replace(SPEC, **change)
