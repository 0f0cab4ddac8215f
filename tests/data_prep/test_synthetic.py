"""Synthetic clips: exact geometry, safe cameras, one folder layout, the same bytes again."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from data_prep.raytrace import Primitive, Texture, World, clearance, depth, render
from data_prep.synthetic import app, make_dataset
from data_prep.synthetic_scenes import PATHS, SCENES, camera_path
from see3d_jax.data.records import decode_depth, decode_image, read_records
from see3d_jax.errors import InputError
from see3d_jax.geometry.cameras import (
    Camera,
    intrinsics_matrix,
    look_at,
    pixel_grid,
    project,
    unproject,
)
from see3d_jax.pipelines.inputs import load_depth, load_images, load_scene

SETTINGS = {"seed": 3, "frames": 9, "width": 48, "height": 32, "fps": 10.0, "supersample": 2}
K = intrinsics_matrix(40, 40, 24, 16)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("synthetic"), 3, SETTINGS, jobs=1)


def _digest(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _plain_world(*objects: Primitive) -> World:
    room = Primitive("room", (0, 0, 2), (4, 5, 2), (0, 0, 0, 0), repeat=1.0)
    gray = Texture(np.full((8, 8, 3), 0.5, np.float32))
    return World((room, *objects), (gray,), (0, 0, 3.9), 0.1, 3.0)


@pytest.mark.parametrize(
    "primitive, expected",
    [
        (Primitive("sphere", (0, 0, 1), (0.5, 0.5, 0.5), (0,) * 4), 2.5),
        (Primitive("cylinder", (0, 0, 1), (0.5, 0.5, 0.8), (0,) * 4), 2.5),
        (Primitive("box", (0, 0, 1), (0.5, 0.4, 0.3), (0,) * 4), 2.5),
        (Primitive("box", (0, 0, 1), (0.5, 0.5, 0.3), (0,) * 4, yaw=np.pi / 4), 3 - 0.5**0.5),
    ],
)
def test_depth_of_each_primitive_is_its_known_distance(primitive, expected):
    """From (3, 0, 1) looking along −x: half a metre of object, then the wall 7 m away."""
    world = _plain_world(primitive)
    pose = look_at((3, 0, 1), (0, 0, 1), up=(0, 0, 1))
    # an odd size puts a pixel centre on the axis
    seen = depth(world, intrinsics_matrix(40, 40, 24.5, 16.5), pose, 49, 33)
    np.testing.assert_allclose(seen[16, 24], expected, atol=2e-3)
    np.testing.assert_allclose(seen[16, 0], 7, atol=1e-4)  # planar: the same all along the wall
    np.testing.assert_allclose(clearance(world, (3, 0, 1)), 1.0, atol=1e-6)  # wall at x = 4
    assert clearance(world, primitive.centre) < 0


def test_shadow_and_light():
    """A sphere under the light darkens the floor below it, and nothing else."""
    ball = Primitive("sphere", (0, 0, 2), (0.4, 0.4, 0.4), (0,) * 4)
    pose = look_at((0.01, -2.5, 3), (0, 0, 0), up=(0, 0, 1))
    camera = Camera(K, pose, 48, 32)
    with_ball, _ = render(_plain_world(ball), K, pose, 48, 32)
    without, _ = render(_plain_world(), K, pose, 48, 32)
    (below, aside), _ = project(camera, np.array([[0, 0, 0], [1.5, 0.5, 0]], np.float32))
    column, row = np.asarray(below).astype(int)
    assert with_ball[row, column].mean() < 0.8 * without[row, column].mean()
    column, row = np.asarray(aside).astype(int)
    np.testing.assert_array_equal(with_ball[row, column], without[row, column])


def test_pictures_are_upright_and_not_mirrored():
    """A picture whose left half is red, on the wall ahead: red is on the left."""
    image = np.zeros((16, 16, 3), np.float32)
    image[:, :8, 0], image[:8, :, 1] = 1, 1  # left red, top green
    for yaw in np.arange(4) * np.pi / 2:
        panel = Primitive("box", (0, 0, 2), (0.8, 0.8, 0.8), (1,) * 4, yaw=yaw)
        base = _plain_world(panel)
        world = World(base.primitives, (*base.textures, Texture(image)), (-3, 3.5, 3.9), 0.1, 3.0)
        pose = look_at((0, 3.5, 2), (0, 0, 2), up=(0, 0, 1))
        seen, _ = render(world, K, pose, 48, 32)
        assert seen[16, 18, 0] > 100 and seen[16, 30, 0] < 20
        assert seen[12, 24, 1] > 100 and seen[20, 24, 1] < 20


@pytest.mark.parametrize("kind", PATHS)
@pytest.mark.parametrize("make_scene", sorted(set(SCENES), key=lambda s: s.__name__))
def test_cameras_keep_their_distance_and_move_smoothly(kind, make_scene):
    rng = np.random.default_rng(11)
    scene = make_scene(rng)
    poses = camera_path(scene, kind, 24, K, rng)
    eyes = -np.einsum("nji,nj->ni", poses[:, :3, :3], poses[:, :3, 3])
    assert min(clearance(scene.world, eye) for eye in eyes) > 0.3
    steps = np.linalg.norm(np.diff(eyes, axis=0), axis=-1)
    assert 0.005 < steps.min() and steps.max() < 0.4
    assert np.linalg.norm(eyes[-1] - eyes[0]) > 0.5  # real parallax


def test_depth_and_poses_agree_across_views(dataset):
    """A surface point of one frame lies on the surface of another wherever it is not hidden."""
    for clip in ("clip_00000", "clip_00002"):
        scene = load_scene(dataset / "scenes" / clip)
        a, b = scene.cameras[2], scene.cameras[5]
        depth_a, depth_b = load_depth(scene, 2), load_depth(scene, 5)
        points = unproject(a, pixel_grid(32, 48).reshape(-1, 2), depth_a.reshape(-1))
        pixels, z = (np.asarray(v) for v in project(b, points))
        inside = np.all((pixels >= 0.5) & (pixels < [47.5, 31.5]), -1) & (z > 0)
        column, row = pixels[inside].astype(int).T
        error = np.abs(depth_b[row, column] / z[inside] - 1)
        assert inside.mean() > 0.3 and np.median(error) < 0.02


def test_layout_is_a_scene_folder_a_video_and_records(dataset):
    scene = load_scene(dataset / "scenes" / "clip_00001")
    images, _ = load_images(scene)
    assert len(images) == 9 and images[0].shape == (32, 48, 3)
    assert min(image.std() for image in images) > 10  # something is to be seen
    assert scene.held_out() == ((1, 2, 3, 4, 5, 6, 7), (0, 8))
    extra = json.loads((scene.root / "transforms.json").read_text())
    assert extra["trajectory"] in PATHS and extra["depth_unit_scale_factor"] == 5e-4
    records = list(read_records(dataset / "records"))
    assert [record.clip_id for record in records] == [f"synthetic-3-clip_0000{i}" for i in range(3)]
    assert all(record.posed for record in records)
    np.testing.assert_array_equal(
        records[1].world_to_camera, [camera.world_to_camera for camera in scene.cameras]
    )
    np.testing.assert_array_equal(
        decode_depth(records[1].depth[4], records[1].depth_unit), load_depth(scene, 4)
    )
    difference = decode_image(records[1].images[4]).astype(float) - images[4]
    assert np.abs(difference).mean() < 4  # JPEG
    import decord

    video = decord.VideoReader(str(dataset / "videos" / "clip_00001.mp4"))
    assert len(video) == 9 and abs(video.get_avg_fps() - 10) < 0.01
    assert (dataset / "contact_sheet.png").is_file()


def test_same_seed_same_bytes_in_any_number_of_processes(dataset, tmp_path):
    again = make_dataset(tmp_path / "again", 2, SETTINGS, jobs=2)
    first, second = _digest(dataset), _digest(again)
    same = [name for name in second if name.startswith(("scenes", "videos"))]
    assert len(same) == 2 * (9 + 9 + 2 + 1)
    assert {name: first[name] for name in same} == {name: second[name] for name in same}


def test_running_again_keeps_clips_and_restores_a_lost_one(tmp_path):
    settings = {**SETTINGS, "frames": 3}
    folder = make_dataset(tmp_path / "d", 2, settings, jobs=1)
    before = _digest(folder)
    import shutil

    shutil.rmtree(folder / "scenes" / "clip_00000")
    kept = (folder / "scenes/clip_00001/transforms.json").stat().st_mtime_ns
    make_dataset(folder, 2, settings, jobs=1)
    assert _digest(folder) == before
    assert (folder / "scenes/clip_00001/transforms.json").stat().st_mtime_ns == kept
    with pytest.raises(InputError, match="made with other settings"):
        make_dataset(folder, 2, {**settings, "seed": 4}, jobs=1)
    (folder / "scenes/clip_00001/transforms.json").write_text("{")
    with pytest.raises(InputError, match="clip_00001: damaged"):
        make_dataset(folder, 2, settings, jobs=1)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--size", "192"], "WIDTHxHEIGHT"),
        (["--size", "8x8"], "16 to 4096"),
        (["--clips", "0"], "0 is not in the range"),
        (["--frames", "1"], "1 is not in the range"),
        (["--seed", "-1"], "-1 is not in the range"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_written(tmp_path, arguments, message):
    import click

    base = ["--output", str(tmp_path / "o"), "--clips", "1"]
    with pytest.raises(click.ClickException, match=message):
        app([*base, *arguments], standalone_mode=False)
    assert not (tmp_path / "o").exists()


def test_output_that_is_a_file_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="is a file"):
        make_dataset(tmp_path / "file", 1, SETTINGS, jobs=1)
