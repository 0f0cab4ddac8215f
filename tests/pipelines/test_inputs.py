"""The door: scenes, photos and depth files, good and bad."""

from __future__ import annotations

import dataclasses
import io
import json
import sys

import numpy as np
import pytest
from PIL import Image

from see3d_jax.data.records import encode_depth
from see3d_jax.errors import InputError
from see3d_jax.geometry.cameras import Camera, intrinsics_matrix, look_at, project, unproject
from see3d_jax.geometry.colmap_files import write_colmap
from see3d_jax.geometry.scene_files import PosedImages, write_transforms
from see3d_jax.media import read_image, write_image
from see3d_jax.pipelines.inputs import (
    list_photos,
    load_depth,
    load_depth_file,
    load_images,
    load_mask,
    load_scene,
)


@pytest.fixture
def scene_folder(tmp_path):
    """Three frames of 40 × 30 with depth and masks."""
    rng = np.random.default_rng(0)
    cameras, names = [], []
    for i in range(3):
        write_image(tmp_path / f"images/{i}.png", rng.integers(0, 255, (30, 40, 3), np.uint8))
        write_image(tmp_path / f"masks/{i}.png", np.eye(30, 40))
        depth = np.full((30, 40), 1.5 + i)
        depth[0, 0] = np.nan
        (tmp_path / "depth").mkdir(exist_ok=True)
        (tmp_path / f"depth/{i}.png").write_bytes(encode_depth(depth, 5e-4))
        cameras.append(Camera(intrinsics_matrix(40, 40, 20, 15), look_at((i, 0, -3), (0, 0, 0)),
                              40, 30))  # fmt: skip
        names.append(f"{i}.png")
    write_transforms(
        tmp_path / "transforms.json",
        PosedImages(
            tuple(f"images/{n}" for n in names), tuple(cameras),
            tuple(f"depth/{n}" for n in names), tuple(f"masks/{n}" for n in names), 5e-4,
        ),
    )  # fmt: skip
    (tmp_path / "splits.json").write_text('{"test": [0], "train_all": [1, 2], "note": "x"}')
    return tmp_path


def test_scene_with_depth_masks_and_splits(scene_folder):
    scene = load_scene(scene_folder)
    assert scene.names == ("0", "1", "2")
    assert scene.held_out() == ((1, 2), (0,))
    images, cameras = load_images(scene, max_size=20)
    assert [image.shape for image in images] == [(15, 20, 3)] * 3
    np.testing.assert_allclose(cameras[0].intrinsics, intrinsics_matrix(20, 20, 10, 7.5))
    depth = load_depth(scene, 1)
    assert depth[0, 0] == 0 and np.allclose(depth[1:], 2.5, atol=3e-4)
    assert load_depth(scene, 1, max_size=20).shape == (15, 20)
    assert load_mask(scene, 0).sum() == 30


def test_colmap_scene_finds_its_images(scene_folder):
    scene = load_scene(scene_folder)
    write_colmap(scene_folder / "sparse/0", PosedImages(("0.png", "1.png"), scene.cameras[:2]))
    (scene_folder / "transforms.json").unlink()
    (scene_folder / "splits.json").unlink()
    colmap = load_scene(scene_folder)
    assert colmap.image_paths == scene.image_paths[:2]
    assert colmap.splits is None and colmap.held_out() == ((1,), (0,))
    with pytest.raises(InputError, match="no depth maps"):
        load_depth(colmap, 0)


def _spoil_size(folder):
    write_image(folder / "images/1.png", np.zeros((31, 40, 3), np.uint8))


def _spoil_depth(folder):
    (folder / "depth/1.png").write_bytes(encode_depth(np.ones((30, 39)), 1e-3))


def _spoil_text(folder):
    (folder / "images/1.png").write_text("hello")


def _spoil_split(folder):
    (folder / "splits.json").write_text('{"test": [3]}')


def _spoil_missing(folder):
    (folder / "images/1.png").unlink()


def _spoil_cameras(folder):
    (folder / "transforms.json").unlink()


@pytest.mark.parametrize(
    "spoil, message",
    [
        (_spoil_size, "images/1.png: image is 40×31 but its camera says 40×30"),
        (_spoil_depth, "depth/1.png: depth map is 39×30"),
        (_spoil_text, "images/1.png: cannot be read as an image"),
        (_spoil_split, "splits.json: test holds 3, no index of the 3 frames"),
        (_spoil_missing, "images/1.png does not exist"),
        (_spoil_cameras, "no cameras found"),
    ],
)
def test_broken_scenes_are_named_in_one_line(scene_folder, spoil, message):
    spoil(scene_folder)
    with pytest.raises(InputError, match=message):
        scene = load_scene(scene_folder)
        load_images(scene)
        for i in range(3):
            load_depth(scene, i)


def test_missing_scene_folder(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        load_scene(tmp_path / "nowhere")


def test_depth_files_of_every_kind_agree(tmp_path):
    depth = np.random.default_rng(0).uniform(0.5, 4, (6, 8)).astype(np.float32)
    depth[0, :3] = [np.nan, np.inf, -1]
    expected = np.where(np.isfinite(depth) & (depth > 0), depth, 0)
    np.save(tmp_path / "a.npy", depth.astype(np.float64)[..., None])
    np.savez(tmp_path / "b.npz", depth=depth, other=np.zeros(3))
    np.savez(tmp_path / "c.npz", anything=depth)
    (tmp_path / "d.png").write_bytes(encode_depth(depth, 1e-4))
    for name, unit, tolerance in (("a.npy", None, 0), ("b.npz", None, 0), ("c.npz", None, 0),
                                  ("d.png", 1e-4, 6e-5)):  # fmt: skip
        found = load_depth_file(tmp_path / name, unit)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, atol=tolerance)
    np.testing.assert_allclose(load_depth_file(tmp_path / "a.npy", 2.0), 2 * expected)


def _png8(size=(6, 8)):
    buffer = io.BytesIO()
    Image.fromarray(np.ones(size, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def _npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("d.png", _png8(), "16 bits"),
        ("d.png", b"text", "cannot be read"),
        ("d.npy", b"", "cannot be read"),
        ("d.npy", _npy(np.zeros((3, 4))), "no pixel has a positive"),
        ("d.npy", _npy(np.ones((3, 4, 3))), "one number per pixel"),
        ("d.npy", _npy(np.array([{"a": 1}], object)), "cannot be read"),
        ("d.npz", b"PK\x03\x04 cut", "cannot be read"),
        ("d.txt", b"1 2 3", "depth must be one of"),
    ],
)
def test_bad_depth_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        load_depth_file(tmp_path / name)
    assert name in str(caught.value)


def test_list_photos(scene_folder, tmp_path):
    expected = [scene_folder / f"images/{i}.png" for i in range(3)]
    assert list_photos(scene_folder) == expected == list_photos(scene_folder / "images")
    assert list_photos(expected[1]) == [expected[1]]
    (tmp_path / "empty").mkdir()
    for bad in (tmp_path / "empty", tmp_path / "no.png", scene_folder / "transforms.json"):
        with pytest.raises(InputError, match=bad.name):
            list_photos(bad)


def test_every_real_scene_loads(shared):
    sizes = {
        "posed/fox": (288, 512),
        "posed/co3d_apple": (288, 512),
        "posed/sceaux_castle": (512, 378),
        "rendered/room": (480, 360),
    }
    for folder, size in sizes.items():
        scene = load_scene(shared / "data" / folder)
        images, cameras = load_images(scene, indices=(0, len(scene) - 1))
        assert images[0].shape == (size[1], size[0], 3)
        assert (cameras[0].width, cameras[0].height) == size
        splits = json.loads((scene.root / "splits.json").read_text()) if scene.splits else {}
        assert scene.held_out()[1] == tuple(splits.get("test", (0, 8)))


def test_room_depth_and_poses_agree_across_views(shared):
    """Pixels of view 0 carried into view 2 land on that view's own surface."""
    scene = load_scene(shared / "data/rendered/room")
    depth, other = load_depth(scene, 0), load_depth(scene, 2)
    from see3d_jax.geometry.cameras import pixel_grid

    pixels = pixel_grid(360, 480)[::4, ::4].reshape(-1, 2)
    points = unproject(scene.cameras[0], pixels, depth[::4, ::4].reshape(-1))
    found, z = (np.asarray(v) for v in project(scene.cameras[2], points))
    inside = np.all((found >= 0) & (found < [480, 360]), -1) & (z > 0)
    column, row = found[inside].astype(int).T
    error = np.abs(other[row, column] / z[inside] - 1)
    assert np.median(error) < 0.01 and np.mean(error < 0.02) > 0.7  # the rest is occluded


def test_motorcycle_depth_archive(shared):
    depth = load_depth_file(shared / "data/stereo/motorcycle/disp_depth.npz")
    assert depth.shape == (500, 741) and 0.9 < np.mean(depth > 0) < 0.95


def test_a_folder_with_inria_cameras_finds_images_without_suffix(scene_folder):
    scene = load_scene(scene_folder)
    pose = np.linalg.inv(np.asarray(scene.cameras[1].world_to_camera, np.float64))
    entry = {
        "img_name": "1", "width": 40, "height": 30, "fx": 40, "fy": 40,
        "position": pose[:3, 3].tolist(), "rotation": pose[:3, :3].tolist(),
    }  # fmt: skip
    for name in ("transforms.json", "splits.json"):
        (scene_folder / name).unlink()
    (scene_folder / "cameras.json").write_text(json.dumps([entry]))
    inria = load_scene(scene_folder)
    assert inria.image_paths == scene.image_paths[1:2]
    np.testing.assert_allclose(
        inria.cameras[0].world_to_camera, scene.cameras[1].world_to_camera, atol=1e-6
    )


@pytest.mark.parametrize("order, scale", [("<f4", -1.0), (">f4", 1.0)])
def test_pfm_depth_is_upright_in_both_byte_orders(tmp_path, order, scale):
    depth = np.arange(1, 7, dtype=np.float32).reshape(2, 3)
    header = f"Pf\n3 2\n{scale}\n".encode()
    (tmp_path / "d.pfm").write_bytes(header + depth[::-1].astype(order).tobytes())
    np.testing.assert_array_equal(load_depth_file(tmp_path / "d.pfm"), depth)
    (tmp_path / "d.pfm").write_bytes(header + depth.tobytes()[:-4])
    with pytest.raises(InputError, match=r"d.pfm: cannot be read as a one-channel PFM"):
        load_depth_file(tmp_path / "d.pfm")


def test_without_mask_files_the_alpha_of_a_picture_is_its_mask(scene_folder):
    scene = dataclasses.replace(load_scene(scene_folder), mask_paths=None)
    pixels = np.full((30, 40, 4), 255, np.uint8)
    pixels[:, 25:, 3] = 0
    Image.fromarray(pixels).save(scene_folder / "images/1.png")
    assert load_mask(scene, 0) is None
    np.testing.assert_array_equal(load_mask(scene, 1), pixels[..., 3] > 0)
    assert load_mask(scene, 1, max_size=20).shape == (15, 20)


@pytest.mark.parametrize("channel", ["Z", "View Layer.Depth.Z", "Y"])
@pytest.mark.parametrize("kind", [np.float16, np.float32])
def test_exr_depth_of_any_renderer(tmp_path, channel, kind):
    exr = pytest.importorskip("OpenEXR", reason="reads .exr")
    depth = np.array([[1.5, 2.0, 0.0], [np.inf, 4.0, 5.0]], kind)
    other = np.ones_like(depth)
    header = {"compression": exr.ZIP_COMPRESSION, "type": exr.scanlineimage}
    exr.File(header, {"A": other, channel: depth}).write(str(tmp_path / "d.exr"))
    expected = np.where(np.isfinite(depth), depth, 0)
    np.testing.assert_array_equal(load_depth_file(tmp_path / "d.exr"), expected)
    exr.File(header, {"A": other}).write(str(tmp_path / "d.exr"))
    with pytest.raises(InputError, match=r"d.exr: no channel Z, V, depth, Y or R; it has A"):
        load_depth_file(tmp_path / "d.exr")
    (tmp_path / "d.exr").write_bytes(b"no exr")
    with pytest.raises(InputError, match=r"d.exr: cannot be read as EXR"):
        load_depth_file(tmp_path / "d.exr")


def test_formats_whose_package_is_missing_name_it(tmp_path, monkeypatch):
    for package, name in (("OpenEXR", "d.exr"), ("pillow_heif", "p.heic")):
        monkeypatch.setitem(sys.modules, package, None)
        (tmp_path / name).write_bytes(b"anything")
        with pytest.raises(InputError, match=f"{name}: .*needs another package; pip install"):
            (load_depth_file if name.endswith("exr") else read_image)(tmp_path / name)


def test_heic_photos_are_read(tmp_path):
    heif = pytest.importorskip("pillow_heif", reason="reads HEIC")
    pixels = np.full((32, 48, 3), (200, 60, 30), np.uint8)
    heif.from_pillow(Image.fromarray(pixels)).save(tmp_path / "p.heic")
    found = read_image(tmp_path / "p.heic")
    assert found.shape == pixels.shape and np.abs(found.astype(int) - pixels).max() < 12
    assert list_photos(tmp_path) == [tmp_path / "p.heic"]


def test_a_video_is_no_photo(tmp_path):
    (tmp_path / "clip.mp4").write_bytes(b"ftyp")
    with pytest.raises(InputError, match=r"clip.mp4: is a video; .*frames.* folder of photos"):
        list_photos(tmp_path / "clip.mp4")
    with pytest.raises(InputError, match=r"holds no photo .*clip.mp4"):
        list_photos(tmp_path)
