import itertools
import subprocess

import imageio_ffmpeg
import numpy as np
import pytest
from curate_scenes import HEIGHT, WIDTH, make, scene
from hypothesis import given
from hypothesis import strategies as st

from data_prep.video import (
    DecodeError,
    DecodeLimits,
    Shot,
    Video,
    decode,
    find_shots,
    picture_area,
    split_long,
)
from see3d_jax.media import write_mp4

LIMITS = DecodeLimits(timeout_seconds=60)


def decoded(path, tmp_path, name="frames"):
    folder = tmp_path / name
    folder.mkdir()
    return decode(path, folder, LIMITS)


def as_video(frames, fps=12.0):
    return Video(np.stack(frames), np.arange(len(frames)) / fps, 0, 0, ())


def test_takes_every_second_frame_of_30_fps_and_keeps_their_times(tmp_path):
    frames = [scene(0.01 * i) for i in range(12)]
    write_mp4(tmp_path / "a.mp4", frames, 30)
    video = decoded(tmp_path / "a.mp4", tmp_path)
    np.testing.assert_allclose(video.times, np.arange(0, 12, 2) / 30, atol=1e-4)
    assert video.frames.shape == (6, HEIGHT, WIDTH, 3)
    assert np.abs(video.frames[1].astype(int) - frames[2]).mean() < 4


def test_large_frames_come_out_at_480p_and_repeated_frames_once(tmp_path):
    big = np.random.default_rng(0).integers(0, 255, (45, 80, 3), np.uint8)
    frames = [np.kron(np.roll(big, i // 4, 1), np.ones((16, 16, 1), np.uint8)) for i in range(12)]
    write_mp4(tmp_path / "a.mp4", frames, 12)
    video = decoded(tmp_path / "a.mp4", tmp_path)
    assert video.frames.shape[1:] == (480, 853, 3)
    assert len(video.frames) == 3 and video.duplicates == 9


def test_rotation_flag_is_honoured(tmp_path):
    write_mp4(tmp_path / "a.mp4", [scene(0.01 * i) for i in range(6)], 12)
    subprocess.run(
        [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-display_rotation:v:0", "90", "-i",
         tmp_path / "a.mp4", "-c", "copy", tmp_path / "turned.mp4"],
        check=True,
    )  # fmt: skip
    video = decoded(tmp_path / "turned.mp4", tmp_path)
    assert video.frames.shape[1:3] == (WIDTH, HEIGHT)
    upright = np.rot90(scene(0), 1)
    assert np.abs(video.frames[0].astype(int) - upright).mean() < 6


def test_broken_files_give_one_line(tmp_path):
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("this is no video\n" * 50)
    for name, reason in (("empty", "0 bytes"), ("text", "no readable video stream")):
        with pytest.raises(DecodeError, match=reason):
            decoded(tmp_path / f"{name}.mp4", tmp_path, name)


def test_a_truncated_file_is_salvaged_and_says_so(tmp_path):
    write_mp4(tmp_path / "a.mp4", make("parallax", 40), 12)
    data = (tmp_path / "a.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[: int(0.6 * len(data))])
    video = decoded(tmp_path / "cut.mp4", tmp_path)
    assert 8 < len(video.frames) < 38
    assert any("salvaged" in note for note in video.notes)


def test_decoding_is_stopped_at_its_time_limit(tmp_path):
    write_mp4(tmp_path / "a.mp4", make("parallax"), 12)
    with pytest.raises(DecodeError, match="longer than"):
        decode(tmp_path / "a.mp4", tmp_path, DecodeLimits(timeout_seconds=0.01))


def test_decoding_is_stopped_at_its_memory_limit(tmp_path):
    write_mp4(tmp_path / "a.mp4", make("parallax"), 12)
    with pytest.raises(DecodeError):
        decode(tmp_path / "a.mp4", tmp_path, DecodeLimits(memory_mb=64))


def test_a_cut_is_found_and_a_fast_camera_is_none():
    assert find_shots(as_video(make("cut"))) == [Shot(0, 14), Shot(14, 28)]
    fast = [scene(0.12 * i) for i in range(8)]
    assert find_shots(as_video(fast)) == [Shot(0, 8)]


def test_fades_are_left_out():
    frames = [scene(0.01 * i) for i in range(6)]
    black = [np.full_like(frames[0], 3)] * 3
    assert find_shots(as_video(frames + black + frames)) == [Shot(0, 6), Shot(9, 15)]


def test_bars_are_cropped_but_a_dark_scene_is_not():
    frames = np.stack([scene(0.01 * i) for i in range(4)])
    frames[:, :30] = 2
    frames[:, -30:] = 2
    rows, columns = picture_area(frames)
    assert 30 <= rows.start <= 33 and HEIGHT - 33 <= rows.stop <= HEIGHT - 30
    assert columns.stop - columns.start >= WIDTH - 4
    dark = np.zeros_like(frames)
    dark[:, 100:140, 100:140] = 200
    assert picture_area(dark) == (slice(0, HEIGHT), slice(0, WIDTH))


@given(st.integers(2, 300), st.floats(0.5, 30), st.floats(1, 60))
def test_splitting_covers_a_shot_without_overlap(count, seconds, fps):
    times = np.arange(count) / fps
    parts = split_long(Shot(0, count), times, seconds)
    assert parts[0].start == 0 and parts[-1].stop == count
    assert all(a.stop == b.start for a, b in itertools.pairwise(parts))
    for part in parts:
        assert times[part.stop - 1] - times[part.start] <= seconds + 1.0 / fps
