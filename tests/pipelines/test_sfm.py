"""Cameras of photos without any: right where they can be found, and one line where they cannot."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import synthetic_scene
from skimage import data

from see3d_jax.errors import InputError, WorkError
from see3d_jax.geometry.cameras import project
from see3d_jax.media import read_image, write_image
from see3d_jax.pipelines import generation, sfm
from see3d_jax.pipelines.inputs import load_images, load_scene
from see3d_jax.pipelines.matching import sift_matches

needs_pycolmap = pytest.mark.skipif(
    importlib.util.find_spec("pycolmap") is None, reason="pycolmap is not installed"
)
FRAMES = 5


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    """A textured room seen by five cameras, whose poses are known."""
    return synthetic_scene(tmp_path_factory.mktemp("synthetic"), FRAMES, 240, 160)


@pytest.fixture(scope="module")
def photos(clip, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("unposed") / "photos"
    folder.mkdir()
    for path in load_scene(clip).image_paths:
        shutil.copy(path, folder)
    return folder


def similarity_errors(found, truth) -> tuple[np.ndarray, np.ndarray]:
    """Distance of centres after the best similarity ÷ their extent; turn to the first, degrees."""
    a, b = (
        np.stack([np.linalg.inv(np.asarray(c.world_to_camera, np.float64)) for c in cameras])
        for cameras in (truth, found)
    )
    at_a, at_b = (m[:, :3, 3] - m[:, :3, 3].mean(0) for m in (a, b))
    u, s, vt = np.linalg.svd(at_a.T @ at_b)
    sign = np.diag([1, 1, np.sign(np.linalg.det(u @ vt))])
    rotation = u @ sign @ vt
    scale = (s * np.diag(sign)).sum() / (at_b**2).sum()
    extent = np.linalg.norm(at_a, axis=1).max()
    distance = np.linalg.norm(at_a - scale * at_b @ rotation.T, axis=1) / extent
    to_first_a, to_first_b = (m[0, :3, :3].T @ m[:, :3, :3] for m in (a, b))
    cosine = (np.einsum("nij,nij->n", to_first_a, to_first_b) - 1) / 2
    return distance, np.degrees(np.arccos(np.clip(cosine, -1, 1)))


@needs_pycolmap
def test_cameras_of_a_room_are_found_and_kept(clip, photos, tmp_path, monkeypatch):
    scene = sfm.open_scene(photos, tmp_path / "cameras")
    truth = load_scene(clip)
    assert scene.names == truth.names
    distance, angle = similarity_errors(scene.cameras, truth.cameras)
    assert (
        distance.max() < 0.05 and angle.max() < 2
    )  # the focal length of five small pictures is loose
    images, cameras = load_images(scene)  # undistorted, and of the size the cameras say
    assert images[0].shape == (cameras[0].height, cameras[0].width, 3)
    pixels, index = scene.observations[0]
    seen, depth = project(cameras[0], scene.points[0][index])
    assert (np.asarray(depth) > 0).all()
    assert np.median(np.linalg.norm(seen - pixels, axis=-1)) < 1
    report = json.loads((tmp_path / "cameras/sfm.json").read_text())
    assert report["left_out"] == [] and len(report["registered"]) == FRAMES
    monkeypatch.setattr(sfm, "_run_worker", None)  # found again, not made again
    assert sfm.open_scene(photos, tmp_path / "cameras").names == scene.names


@needs_pycolmap
def test_another_matcher_finds_the_same_cameras(clip, photos, tmp_path, monkeypatch):
    """OpenCV's SIFT in the place of a learned matcher."""
    (tmp_path / "matcher.onnx").write_text("stands for a network")
    monkeypatch.setattr(sfm, "load_matcher", lambda path: sift_matches)
    scene = sfm.open_scene(photos, tmp_path / "cameras", tmp_path / "matcher.onnx")
    distance, angle = similarity_errors(scene.cameras, load_scene(clip).cameras)
    assert len(scene) == FRAMES and distance.max() < 0.1 and angle.max() < 4
    monkeypatch.setattr(sfm, "load_matcher", lambda path: lambda a, b: sift_matches(a, b)[:0])
    (tmp_path / "matcher.onnx").write_text("another")
    with pytest.raises(InputError, match="no two of the 5 photos overlap"):
        sfm.open_scene(photos, tmp_path / "cameras", tmp_path / "matcher.onnx")
    assert len(load_scene(tmp_path / "cameras")) == FRAMES  # what was there is still there


@pytest.mark.slow
@needs_pycolmap
def test_new_views_of_unposed_photos(photos, tmp_path, monkeypatch):
    """Without cameras, depth or chosen references: three photos are chosen and stereo is enough."""
    model = SimpleNamespace(
        name="none", image_size=64, size_multiple=8, views=8,
        composite=False, sampling=SimpleNamespace(guidance=0.0, num_steps=1),
    )  # fmt: skip
    model.sampled_with = lambda steps, guidance: model
    monkeypatch.setattr(generation, "load_model", lambda *_, **__: model)
    monkeypatch.setattr(generation, "sample_groups", lambda _, given, warps, *rest: warps)
    result = generation.generate(
        photos, trajectory="orbit", views=2, checkpoint=tmp_path,
        cameras_folder=sfm.beside(tmp_path / "out"),
    )  # fmt: skip
    assert len(result.references) == 3 and result.run["depth_from"] == "stereo"
    assert (tmp_path / "out_cameras/sparse/0/points3D.txt").is_file()
    assert 0.2 < result.masks.mean() < 1


def _write(folder: Path, pictures: list[np.ndarray]) -> Path:
    for i, picture in enumerate(pictures):
        write_image(folder / f"{i}.png", picture)
    return folder


def _different() -> list[np.ndarray]:
    return [getattr(data, name)()[:200, :240] for name in ("astronaut", "coffee", "chelsea")]


def _one_pair() -> list[np.ndarray]:
    return [*_different(), _different()[0][5:, 9:]]


def _zooms() -> list[np.ndarray]:
    """Crops of one photo: what a camera sees that zooms but does not move."""
    return [data.astronaut()[s : 400 - s, s : 400 - s] for s in (0, 15, 30)]


@needs_pycolmap
@pytest.mark.parametrize(
    "pictures, message",
    [
        (_different, "no two of the 3 photos overlap"),
        (
            lambda: [*_different(), _different()[0][5:, 9:]],
            "only one pair of the 4 photos overlaps",
        ),
        (_zooms, "show no parallax; move the camera"),
    ],
)
def test_why_there_are_no_cameras(tmp_path, pictures, message):
    with pytest.raises(InputError, match=message):
        sfm.find_cameras(_write(tmp_path / "photos", pictures()), tmp_path / "cameras")
    assert [p.name for p in tmp_path.iterdir()] == ["photos"]  # nothing half-made is left


def test_one_photo_is_not_a_set(tmp_path):
    with pytest.raises(InputError, match=r"one photo shows no parallax; .*--depth"):
        sfm.find_cameras(_write(tmp_path / "photos", _different()[:1]), tmp_path / "cameras")


def test_without_the_package_the_command_to_install_it_is_named(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'see3d_jax\[sfm\]'"):
        sfm.open_scene(photos, tmp_path / "cameras")


@pytest.mark.parametrize(
    "code, seconds, message",
    [
        ("import os; os.abort()", 60, "was ended by SIGABRT: it said nothing"),
        ("print('no memory'); raise SystemExit(3)", 60, "ended with code 3: no memory"),
        ("import time; time.sleep(60)", 0.5, "took more than 0.5 s; give fewer photos"),
    ],
)
def test_a_worker_that_fails_is_one_line(photos, tmp_path, monkeypatch, code, seconds, message):
    worker = tmp_path / "worker.py"
    worker.write_text(code)
    monkeypatch.setattr(sfm, "_WORKER", worker)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    with pytest.raises(WorkError, match=message):
        sfm.find_cameras(photos, tmp_path / "cameras", max_seconds=seconds)
    assert [p.name for p in tmp_path.iterdir()] == ["worker.py"]


def test_a_folder_that_is_not_ours_is_left_alone(photos, tmp_path):
    (tmp_path / "cameras").mkdir()
    with pytest.raises(InputError, match="holds no cameras of ours"):
        sfm.find_cameras(photos, tmp_path / "cameras")


@needs_pycolmap
@pytest.mark.slow
@pytest.mark.parametrize(
    "folder, posed", [("unposed/kermit", False), ("unposed/mipnerf360_kitchen25", False),
                      ("posed/sceaux_castle", True), ("posed/fox", True),
                      ("posed/co3d_apple", True), ("rendered/room", True)],
)  # fmt: skip
def test_real_sets(shared, tmp_path, folder, posed):
    source = shared / "data" / folder
    shutil.copytree(source / "images" if posed else source, tmp_path / "photos")
    scene = sfm.open_scene(tmp_path / "photos", tmp_path / "cameras")
    assert len(scene) == len(list((tmp_path / "photos").iterdir()))
    if posed:
        truth = load_scene(source)
        named = dict(zip(truth.names, truth.cameras, strict=True))
        distance, angle = similarity_errors(scene.cameras, [named[n] for n in scene.names])
        # The apple's true focal lengths differ from frame to frame; the photos' share one.
        assert np.median(distance) < 0.015 and distance.max() < 0.05 and angle.max() < 2


def test_photos_are_turned_upright_and_keep_their_focal_length(tmp_path):
    from PIL import Image

    from see3d_jax.media import upright_jpeg

    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side
    exif.get_ifd(0x8769)[0xA405] = 28  # FocalLengthIn35mmFilm
    Image.fromarray(data.astronaut()[:100, :200]).save(tmp_path / "a.jpg", exif=exif)
    upright_jpeg(tmp_path / "a.jpg", tmp_path / "b.jpg", 100)
    with Image.open(tmp_path / "b.jpg") as copy:
        assert copy.size == (50, 100)
        assert copy.getexif().get(0x0112, 1) == 1
        assert copy.getexif().get_ifd(0x8769)[0xA405] == 28
    assert read_image(tmp_path / "b.jpg").shape == (100, 50, 3)
