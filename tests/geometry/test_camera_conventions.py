"""Every camera format against a drawn picture, and both ways with COLMAP's own library."""

from __future__ import annotations

import json

import numpy as np
import pytest

from see3d_jax.geometry.cameras import Camera, intrinsics_matrix, look_at, project
from see3d_jax.geometry.colmap_files import read_colmap, write_colmap
from see3d_jax.geometry.scene_files import (
    PointCloud,
    PosedImages,
    read_inria_cameras,
    read_transforms,
    write_transforms,
)

# The picture: a camera 5 before the origin looks at it; what lies to its right is drawn red at the
# right, what lies above is drawn green at the top. World axes: x right, y up, z towards the camera.
WIDTH, HEIGHT, FOCAL = 80, 60, 50
RED, GREEN = (255, 0, 0), (0, 255, 0)
DOTS = {RED: (1.0, 0.0, 0.0), GREEN: (0.0, 1.0, 0.0)}


def drawn_picture() -> np.ndarray:
    picture = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    step = int(FOCAL / 5)  # pixels that 1 is wide at distance 5
    picture[HEIGHT // 2 - 2 : HEIGHT // 2 + 2, WIDTH // 2 + step - 2 : WIDTH // 2 + step + 2] = RED
    picture[HEIGHT // 2 - step - 2 : HEIGHT // 2 - step + 2, WIDTH // 2 - 2 : WIDTH // 2 + 2] = (
        GREEN
    )
    return picture


def nerfstudio(folder):
    """Camera→world, OpenGL axes: here simply 5 along z."""
    matrix = np.eye(4)
    matrix[2, 3] = 5
    frame = {"file_path": "a.png", "transform_matrix": matrix.tolist()}
    content = {"fl_x": FOCAL, "fl_y": FOCAL, "w": WIDTH, "h": HEIGHT, "frames": [frame]}
    (folder / "transforms.json").write_text(json.dumps(content))
    return read_transforms(folder / "transforms.json")


def inria(folder):
    """Camera→world, OpenCV axes: y and z of the camera are turned over."""
    entry = {
        "id": 0, "img_name": "a", "width": WIDTH, "height": HEIGHT, "fx": FOCAL, "fy": FOCAL,
        "position": [0, 0, 5], "rotation": [[1, 0, 0], [0, -1, 0], [0, 0, -1]],
    }  # fmt: skip
    (folder / "cameras.json").write_text(json.dumps([entry]))
    return read_inria_cameras(folder / "cameras.json")


def colmap(folder):
    """World→camera: half a turn about x, quaternion (0, 1, 0, 0); the origin is 5 ahead."""
    (folder / "cameras.txt").write_text(f"1 SIMPLE_PINHOLE {WIDTH} {HEIGHT} {FOCAL} 40 30\n")
    (folder / "images.txt").write_text("1 0 1 0 0 0 0 5 1 a.png\n\n")
    return read_colmap(folder)


@pytest.mark.parametrize("write", [nerfstudio, inria, colmap], ids=lambda f: f.__name__)
def test_dots_are_where_they_are_drawn(tmp_path, write):
    (camera,) = write(tmp_path).cameras
    picture = drawn_picture()
    for colour, place in DOTS.items():
        (pixel,), (depth,) = (np.asarray(v) for v in project(camera, np.array([place])))
        assert depth == pytest.approx(5)
        assert tuple(picture[int(pixel[1]), int(pixel[0])]) == colour


def _posed() -> PosedImages:
    rng = np.random.default_rng(0)
    cameras = tuple(
        Camera(intrinsics_matrix(70.25, 71.5, 32.3, 23.5), look_at(eye, (0, 0, 0)), 64, 48)
        for eye in rng.normal(size=(3, 3)) * 3
    )
    points = PointCloud(rng.uniform(-0.5, 0.5, (6, 3)).astype(np.float32),
                        rng.integers(0, 256, (6, 3)).astype(np.uint8))  # fmt: skip
    seen = tuple((np.array(project(c, points.xyz)[0]), np.arange(6)) for c in cameras)
    files = ("views/00000.png", "views/00001.png", "references/a.png")
    return PosedImages(files, cameras, points=points, observations=seen)


def _assert_agrees(model, ours: PosedImages) -> None:
    """Poses, intrinsics, points and projections of COLMAP's library and of our loader."""
    theirs = {image.name: image for image in model.images.values()}
    assert sorted(theirs) == sorted(ours.files)
    xyz = np.array([p.xyz for p in model.points3D.values()]).reshape(-1, 3)
    order = np.lexsort(xyz.T), np.lexsort(ours.points.xyz.T)
    np.testing.assert_allclose(xyz[order[0]], ours.points.xyz[order[1]], atol=1e-6)
    for file, camera, (pixels, index) in zip(
        ours.files, ours.cameras, ours.observations, strict=True
    ):
        image = theirs[file]
        pose = image.cam_from_world().matrix()
        np.testing.assert_allclose(pose, camera.world_to_camera[:3], atol=1e-5)
        np.testing.assert_allclose(image.camera.calibration_matrix(), camera.intrinsics, rtol=1e-6)
        assert (image.camera.width, image.camera.height) == (camera.width, camera.height)
        places = ours.points.xyz[index]
        found, _ = project(camera, places)
        expected = [image.project_point(place.astype(np.float64)) for place in places]
        np.testing.assert_allclose(found, expected, atol=2e-3)
        seen = np.array([p.xy for p in image.points2D if p.has_point3D()]).reshape(-1, 2)
        np.testing.assert_allclose(np.sort(seen, 0), np.sort(pixels, 0), atol=1e-3)


def test_what_we_write_loads_in_colmap(tmp_path):
    pycolmap = pytest.importorskip("pycolmap", reason="COLMAP's library")
    images = _posed()
    write_colmap(tmp_path, images)
    _assert_agrees(pycolmap.Reconstruction(tmp_path), images)


@pytest.mark.parametrize("binary", [True, False])
def test_what_colmap_writes_loads_here(tmp_path, binary):
    pycolmap = pytest.importorskip("pycolmap", reason="COLMAP's library")
    write_colmap(tmp_path / "ours", _posed())
    model = pycolmap.Reconstruction(tmp_path / "ours")
    (tmp_path / "theirs").mkdir()
    (model.write_binary if binary else model.write_text)(tmp_path / "theirs")
    _assert_agrees(model, read_colmap(tmp_path / "theirs"))


def test_the_castle_is_read_as_colmap_reads_it(shared):
    pycolmap = pytest.importorskip("pycolmap", reason="COLMAP's library")
    folder = shared / "data/posed/sceaux_castle/sparse/0"
    model, ours = pycolmap.Reconstruction(folder), read_colmap(folder)
    theirs = {image.name: image for image in model.images.values()}
    assert len(model.points3D) == len(ours.points.xyz)
    for file, camera in zip(ours.files, ours.cameras, strict=True):
        pose = theirs[file].cam_from_world().matrix()
        np.testing.assert_allclose(pose, camera.world_to_camera[:3], atol=1e-5)
        np.testing.assert_allclose(
            theirs[file].camera.calibration_matrix(), camera.intrinsics, rtol=1e-6
        )


@pytest.mark.parametrize("same_size", [True, False])
def test_what_we_write_keeps_nerfstudios_rules(tmp_path, same_size):
    """Its loader wants each intrinsic at the top or in every frame, and rigid 4×4 poses."""
    images = _posed()
    if not same_size:
        cameras = (images.cameras[0].resized(32, 24), *images.cameras[1:])
        images = PosedImages(images.files, cameras)
    write_transforms(tmp_path / "transforms.json", images)
    content = json.loads((tmp_path / "transforms.json").read_text())
    assert content["camera_model"] in ("PINHOLE", "SIMPLE_PINHOLE", "OPENCV")
    for key in ("fl_x", "fl_y", "cx", "cy", "w", "h"):
        assert (key in content) != all(key in frame for frame in content["frames"])
    for frame, camera in zip(content["frames"], images.cameras, strict=True):
        matrix = np.array(frame["transform_matrix"])
        assert matrix.shape == (4, 4) and np.linalg.det(matrix[:3, :3]) == pytest.approx(1, 1e-5)
        # its rays: OpenGL camera axes, so a pixel's direction is (x, −y, −1)
        at = np.array([10.5, 20.5])
        k = np.asarray(camera.intrinsics, np.float64)
        ray = np.array([(at[0] - k[0, 2]) / k[0, 0], -(at[1] - k[1, 2]) / k[1, 1], -1.0])
        point = matrix[:3, :3] @ ray * 2.5 + matrix[:3, 3]
        pixel, depth = project(camera, point[None].astype(np.float32))
        np.testing.assert_allclose(pixel[0], at, atol=1e-2)
        assert float(depth[0]) == pytest.approx(2.5, rel=1e-4)
