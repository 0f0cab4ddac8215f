"""Camera files: conventions against a hand-made camera, round trips, refusals."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest

from see3d_jax.errors import InputError
from see3d_jax.geometry.cameras import Camera, intrinsics_matrix, look_at, project
from see3d_jax.geometry.colmap_files import find_colmap_model, read_colmap, write_colmap
from see3d_jax.geometry.scene_files import (
    PointCloud,
    PosedImages,
    read_inria_cameras,
    read_transforms,
    write_inria_cameras,
    write_transforms,
)


def _images(count: int = 3, same_size: bool = True) -> PosedImages:
    rng = np.random.default_rng(0)
    cameras = []
    for i in range(count):
        width = 64 if same_size else 64 + 2 * i
        intrinsics = intrinsics_matrix(70.25, 71.5, width / 2 + 0.3, 23.5)
        pose = look_at(rng.normal(size=3) * 4, rng.normal(size=3))
        cameras.append(Camera(intrinsics, pose, width, 48))
    return PosedImages(tuple(f"images/{i:03d}.png" for i in range(count)), tuple(cameras))


def _assert_same_cameras(found, expected):
    assert len(found) == len(expected)
    for a, b in zip(found, expected):
        assert (a.width, a.height) == (b.width, b.height)
        np.testing.assert_array_equal(a.intrinsics, b.intrinsics)
        np.testing.assert_allclose(a.world_to_camera, b.world_to_camera, atol=2e-6)


@pytest.mark.parametrize("same_size", [True, False])
def test_transforms_json_round_trip(tmp_path, same_size):
    images = _images(same_size=same_size)
    written = PosedImages(
        images.files, images.cameras, ("d/0.png", "d/1.png", "d/2.png"),
        ("m/0.png", "m/1.png", "m/2.png"), 2e-4, extra={"aabb_scale": 4},
    )  # fmt: skip
    write_transforms(tmp_path / "transforms.json", written)
    read = read_transforms(tmp_path / "transforms.json")
    _assert_same_cameras(read.cameras, images.cameras)
    for field in ("files", "depth_files", "mask_files", "depth_unit", "extra"):
        assert getattr(read, field) == getattr(written, field)


def test_transforms_json_is_camera_to_world_with_opengl_axes(tmp_path):
    """A camera at (0, 0, 5) with an identity rotation looks down −z, with y up."""
    matrix = np.eye(4)
    matrix[2, 3] = 5
    content = {"fl_x": 10, "w": 8, "h": 6, "frames": [
        {"file_path": "a.png", "transform_matrix": matrix.tolist()}]}  # fmt: skip
    (tmp_path / "transforms.json").write_text(json.dumps(content))
    (camera,) = read_transforms(tmp_path / "transforms.json").cameras
    pixels, depth = project(camera, np.array([[0.0, 0, 0], [1, 0, 0], [0, 1, 0]], np.float32))
    np.testing.assert_allclose(depth, 5, atol=1e-6)
    np.testing.assert_allclose(pixels, [[4, 3], [6, 3], [4, 1]], atol=1e-5)


def test_blender_files_take_size_from_the_image_and_focal_from_the_angle(tmp_path):
    from see3d_jax.media import write_image

    write_image(tmp_path / "train" / "r_0.png", np.zeros((30, 40, 3), np.uint8))
    content = {"camera_angle_x": 2 * np.arctan(0.5), "frames": [
        {"file_path": "./train/r_0", "transform_matrix": np.eye(4).tolist()}]}  # fmt: skip
    (tmp_path / "transforms.json").write_text(json.dumps(content))
    read = read_transforms(tmp_path / "transforms.json")
    assert read.files == ("./train/r_0.png",)
    np.testing.assert_allclose(
        read.cameras[0].intrinsics, intrinsics_matrix(40, 40, 20, 15), rtol=1e-6
    )


@pytest.mark.parametrize(
    "change, message",
    [
        ({"k1": 0.1}, "k1 = 0.1; undistort"),
        ({"camera_model": "OPENCV_FISHEYE"}, "OPENCV_FISHEYE is not a pinhole"),
        ({"distortion_params": [0, 0, 0.1]}, "distortion_params"),
        ({"fl_x": None}, "fl_x must be a finite number"),
        ({"fl_x": -4}, "focal lengths must be positive"),
        ({"w": 8.5}, "whole and positive"),
        ({"transform_matrix": (2 * np.eye(4)).tolist()}, "not rigid"),
        ({"transform_matrix": np.diag([1, 1, -1, 1]).tolist()}, "not rigid"),
        ({"transform_matrix": [[1, 2], [3, 4]]}, "must be 4×4"),
        ({"transform_matrix": "x"}, "not a matrix"),
        ({"transform_matrix": np.full((4, 4), np.nan).tolist()}, "NaN"),
        ({"file_path": 3}, "file_path must be text"),
    ],
)
def test_transforms_json_refuses_what_it_cannot_honour(tmp_path, change, message):
    frame = {"file_path": "a.png", "transform_matrix": np.eye(4).tolist(),
             "fl_x": 10, "w": 8, "h": 6}  # fmt: skip
    path = tmp_path / "transforms.json"
    path.write_text(json.dumps({"frames": [{**frame, **change}]}))
    with pytest.raises(InputError, match=message) as caught:
        read_transforms(path)
    assert str(path) in str(caught.value) and "frames[0]" in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"frames": []}', '{"frames": [3]}'])
def test_a_file_that_is_no_transforms_json_is_named(tmp_path, text):
    path = tmp_path / "transforms.json"
    path.write_text(text)
    with pytest.raises(InputError, match=r"transforms\.json"):
        read_transforms(path)


def _with_points(images: PosedImages) -> PosedImages:
    rng = np.random.default_rng(1)
    points = PointCloud(
        rng.normal(size=(5, 3)).astype(np.float32), rng.integers(0, 256, (5, 3)).astype(np.uint8)
    )
    observations = tuple(
        (rng.uniform(0, 40, (n, 2)).astype(np.float32), np.arange(n)) for n in (2, 0, 5)
    )
    return PosedImages(images.files, images.cameras, points=points, observations=observations)


def test_colmap_text_round_trip_keeps_points_and_observations(tmp_path):
    images = _with_points(_images(same_size=False))
    write_colmap(tmp_path / "sparse" / "0", images)
    assert find_colmap_model(tmp_path) == tmp_path / "sparse" / "0"
    read = read_colmap(tmp_path / "sparse" / "0")
    _assert_same_cameras(read.cameras, images.cameras)
    assert read.files == ("000.png", "001.png", "002.png")
    np.testing.assert_array_equal(read.points.xyz, images.points.xyz)
    np.testing.assert_array_equal(read.points.rgb, images.points.rgb)
    for (pixels, index), (pixels_then, index_then) in zip(read.observations, images.observations):
        np.testing.assert_array_equal(pixels, pixels_then)
        np.testing.assert_array_equal(index, index_then)


def _write_binary_model(folder, model_id=1, params=(70.25, 71.5, 32.3, 23.5)):
    """The layout that COLMAP documents, written here independently of the reader."""
    images = _with_points(_images())
    folder.mkdir(parents=True)
    from see3d_jax.geometry.transforms import rotation_to_quaternion

    cameras = struct.pack("<QiiQQ", 1, 7, model_id, 64, 48) + struct.pack(
        f"<{len(params)}d", *params
    )
    body = struct.pack("<Q", 3)
    for i in (2, 0, 1):  # not in the order of names
        pose = np.asarray(images.cameras[i].world_to_camera, np.float64)
        quaternion = -rotation_to_quaternion(pose[:3, :3])  # either sign is the same rotation
        pixels, index = images.observations[i]
        body += struct.pack("<i7di", i + 1, *quaternion, *pose[:3, 3], 7)
        body += f"{i:03d}.png".encode() + b"\0" + struct.pack("<Q", len(index) + 1)
        body += struct.pack("<ddq", 1.0, 2.0, -1)  # a keypoint without a point
        for pixel, point in zip(pixels, index):
            body += struct.pack("<ddq", *pixel, 100 + point)
    points = struct.pack("<Q", 5)
    for n in (4, 3, 2, 1, 0):
        points += struct.pack("<Q3d", 100 + n, *images.points.xyz[n])
        points += struct.pack("<3BdQ", *images.points.rgb[n], 0.5, 2) + struct.pack("<4i", *[1] * 4)
    for name, data in (("cameras", cameras), ("images", body), ("points3D", points)):
        (folder / f"{name}.bin").write_bytes(data)
    return images


def test_colmap_binary_model(tmp_path):
    images = _write_binary_model(tmp_path / "m")
    read = read_colmap(tmp_path / "m")
    assert read.files == ("000.png", "001.png", "002.png")
    _assert_same_cameras(read.cameras, images.cameras)
    np.testing.assert_array_equal(read.points.xyz, images.points.xyz)
    for (pixels, index), (pixels_then, index_then) in zip(read.observations, images.observations):
        np.testing.assert_array_equal(pixels, pixels_then)
        np.testing.assert_array_equal(index, index_then)


def test_colmap_radial_camera_is_taken_only_without_distortion(tmp_path):
    _write_binary_model(tmp_path / "zero", 2, (70.0, 32.0, 24.0, 0.0))
    camera = read_colmap(tmp_path / "zero").cameras[0]
    np.testing.assert_array_equal(camera.intrinsics, intrinsics_matrix(70, 70, 32, 24))
    _write_binary_model(tmp_path / "bent", 2, (70.0, 32.0, 24.0, 0.05))
    with pytest.raises(InputError, match=r"SIMPLE_RADIAL with distortion \[0.05\]; undistort"):
        read_colmap(tmp_path / "bent")
    _write_binary_model(tmp_path / "fish", 5, (70.0, 70.0, 32.0, 24.0, 0, 0, 0, 0))
    with pytest.raises(InputError, match="OPENCV_FISHEYE is not a pinhole"):
        read_colmap(tmp_path / "fish")


@pytest.mark.parametrize("name", ["cameras.bin", "images.bin", "points3D.bin"])
@pytest.mark.parametrize("keep", [0.0, 0.6])
def test_colmap_file_cut_off_is_named(tmp_path, name, keep):
    _write_binary_model(tmp_path / "m")
    path = tmp_path / "m" / name
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    with pytest.raises(InputError, match=f"{name}.*(cut off|no registered)"):
        read_colmap(tmp_path / "m")


def test_colmap_points_of_the_castle_reproject_where_they_were_seen(shared):
    """Real SfM: 9020 points, mean 0.39 px at 1600 px, that is 0.125 px at the stored 512 px."""
    read = read_colmap(shared / "data/posed/sceaux_castle/sparse/0")
    errors = []
    for camera, (pixels, index) in zip(read.cameras, read.observations):
        found, depth = project(camera, read.points.xyz[index])
        assert np.all(np.asarray(depth) > 0)
        errors.append(np.linalg.norm(found - pixels, axis=-1))
    assert len(read.points.xyz) == 9020
    assert np.mean(np.concatenate(errors)) < 0.14


@pytest.mark.parametrize("scene", ["posed/fox", "posed/co3d_apple", "rendered/room"])
def test_real_transforms_survive_rewriting(shared, tmp_path, scene):
    original = read_transforms(shared / "data" / scene / "transforms.json")
    write_transforms(tmp_path / "transforms.json", original)
    again = read_transforms(tmp_path / "transforms.json")
    _assert_same_cameras_loosely(again.cameras, original.cameras)
    assert again.depth_files == original.depth_files and again.depth_unit == original.depth_unit
    write_colmap(tmp_path / "colmap", original)
    _assert_same_cameras_loosely(read_colmap(tmp_path / "colmap").cameras, original.cameras)


def _assert_same_cameras_loosely(found, expected):
    for a, b in zip(found, expected):  # scenes are up to 25 units wide: float32 rounding grows
        np.testing.assert_allclose(a.world_to_camera, b.world_to_camera, atol=2e-5)
        np.testing.assert_array_equal(a.intrinsics, b.intrinsics)


def _inria_entry(camera, name="0000"):
    pose = np.linalg.inv(np.asarray(camera.world_to_camera, np.float64))
    return {
        "id": 0, "img_name": name, "width": camera.width, "height": camera.height,
        "position": pose[:3, 3].tolist(), "rotation": pose[:3, :3].tolist(), "fx": 70, "fy": 71,
    }  # fmt: skip


def test_inria_cameras_look_where_they_looked(tmp_path):
    """The point a camera looks at is drawn in the middle of its picture, wherever it stands."""
    camera = Camera(intrinsics_matrix(70, 71, 32, 24), look_at((3, 1, -2), (0.5, 0, 0)), 64, 48)
    (tmp_path / "cameras.json").write_text(json.dumps([_inria_entry(camera)]))
    read = read_inria_cameras(tmp_path / "cameras.json")
    _assert_same_cameras(read.cameras, [camera])
    pixel, depth = project(read.cameras[0], np.array([[0.5, 0, 0]], np.float32))
    np.testing.assert_allclose(pixel, [[32, 24]], atol=1e-3)
    assert depth > 0


def test_inria_cameras_come_back_with_their_principal_points(tmp_path):
    images = _images(3, same_size=False)
    write_inria_cameras(tmp_path / "cameras.json", images)
    read = read_inria_cameras(tmp_path / "cameras.json")
    assert read.files == images.files
    _assert_same_cameras(read.cameras, images.cameras)
    entry = json.loads((tmp_path / "cameras.json").read_text())[1]
    official = {"id", "img_name", "width", "height", "position", "rotation", "fx", "fy"}
    assert official < set(entry) and entry["id"] == 1


@pytest.mark.parametrize(
    "change, message",
    [
        ({"rotation": [[1, 0], [0, 1]]}, r"\[0\]: rotation must be numbers"),
        ({"rotation": (2 * np.eye(3)).tolist()}, "rotation is not rigid"),
        ({"position": "here"}, "position must be numbers"),
        ({"fx": None}, "fx must be a finite number"),
        ({"img_name": 3}, "with an img_name"),
    ],
)
def test_a_wrong_inria_entry_is_named(tmp_path, change, message):
    camera = Camera(intrinsics_matrix(70, 71, 32, 24), look_at((3, 1, -2), (0.5, 0, 0)), 64, 48)
    (tmp_path / "cameras.json").write_text(json.dumps([{**_inria_entry(camera), **change}]))
    with pytest.raises(InputError, match=message):
        read_inria_cameras(tmp_path / "cameras.json")
