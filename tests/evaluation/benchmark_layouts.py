"""Small folders in the layouts in which the benchmarks are distributed, with known cameras.

Every writer takes cameras of this project and writes them in the benchmark's own convention, by
formulas of its documentation and not by those of the reader. The world point `POINT` is drawn as a
white square of 7 pixels on dark pictures, at the pixel where its camera sees it.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np

from see3d_jax.geometry.cameras import Camera, intrinsics_matrix, look_at
from see3d_jax.geometry.colmap_files import write_colmap
from see3d_jax.geometry.scene_files import PosedImages
from see3d_jax.media import write_image

WIDTH, HEIGHT = 96, 64
POINT = np.array([0.3, -0.2, 0.4])
NAMES = ("c.png", "a.png", "d.png", "b.png", "e.png")  # written in an order that is not sorted


def arc(count: int = 5, fx: float = 80.0, fy: float = 80.0, cx: float = 48.0, cy: float = 32.0):
    """Cameras on an arc around the origin; the i-th belongs to the i-th name in sorted order."""
    return [
        Camera(
            intrinsics_matrix(fx, fy, cx, cy),
            look_at((3 * np.sin(a), -0.4 + 0.1 * i, -3 * np.cos(a)), (0, 0, 0.2)), WIDTH, HEIGHT,
        )
        for i, a in enumerate(np.linspace(-0.6, 0.5, count))
    ]  # fmt: skip


def pixel(camera: Camera) -> np.ndarray:
    """Where the camera sees POINT, in plain NumPy: (x, y), pixel centres at +0.5."""
    p = np.asarray(camera.world_to_camera, float) @ np.append(POINT, 1)
    q = np.asarray(camera.intrinsics, float) @ p[:3]
    return q[:2] / q[2]


def photo(camera: Camera, scale: float = 1.0) -> np.ndarray:
    """Dark, with the point as a white square."""
    image = np.full((round(HEIGHT * scale), round(WIDTH * scale), 3), 30, np.uint8)
    x, y = np.floor(pixel(camera) * scale).astype(int)
    image[y - 3 : y + 4, x - 3 : x + 4] = 255
    return image


def seen_at(image: np.ndarray) -> np.ndarray:
    """(x, y) of the middle of the white square."""
    rows, columns = np.nonzero(image[..., 0] > 127)
    return np.array([columns.mean(), rows.mean()]) + 0.5


def _photos(folder: Path, cameras: list[Camera], names: list[str] | None = None, scale=1.0) -> None:
    order = np.argsort([name for name in names or NAMES])
    for rank, index in enumerate(order):
        write_image(folder / (names or NAMES)[index], photo(cameras[rank], scale))


def _camera_to_world(camera: Camera) -> np.ndarray:
    return np.linalg.inv(np.asarray(camera.world_to_camera, float))


def write_llff(folder: Path) -> list[Camera]:
    """poses_bounds.npy for photos of 96 × 64, of which half-sized copies are there as well."""
    cameras = arc()
    _photos(folder / "images", cameras)
    _photos(folder / "images_2", cameras, scale=0.5)
    rows = []
    for camera in cameras:
        pose = _camera_to_world(camera)
        # LLFF's columns are the directions down, right and backwards.
        axes = np.stack([pose[:3, 1], pose[:3, 0], -pose[:3, 2]], 1)
        matrix = np.concatenate(
            [axes, pose[:3, 3:], np.array([[HEIGHT], [WIDTH], [camera.intrinsics[0, 0]]])], 1
        )
        rows.append(np.append(matrix.ravel(), [1.0, 9.0]))
    np.save(folder / "poses_bounds.npy", np.array(rows))
    return cameras


def write_dtu(folder: Path, count: int = 5, larger: int = 4) -> list[Camera]:
    """cameras.npz for pictures 4 times as large, in millimetres around another origin."""
    cameras = arc(count, 82.0, 84.0, 45.0, 33.0)
    names = [f"{i:06d}.png" for i in range(count)]
    _photos(folder / "image", cameras, names)
    scale, origin = 250.0, np.array([30.0, -70.0, 600.0])  # unit space → millimetres
    arrays = {}
    for i, camera in enumerate(cameras):
        k = np.asarray(camera.intrinsics, float)
        k[:2] *= larger
        rotation = np.asarray(camera.world_to_camera, float)[:3, :3]
        centre = _camera_to_world(camera)[:3, 3] * scale + origin
        projection = np.eye(4)
        projection[:3] = -7.5 * k @ np.column_stack([rotation, -rotation @ centre])
        arrays[f"world_mat_{i}"] = projection
        normalise = np.diag([scale, scale, scale, 1.0])
        normalise[:3, 3] = origin
        arrays[f"scale_mat_{i}"] = normalise
        mask = np.zeros((HEIGHT * larger, WIDTH * larger), np.uint8)
        mask[:, : WIDTH * larger // 2] = 255
        write_image(folder.parent / "idrmasks" / folder.name / f"{i:03d}.png", mask)
    np.savez(folder / "cameras.npz", **arrays)
    return cameras


def write_realestate(folder: Path, clip: str = "0f3a") -> list[Camera]:
    """CLIP.txt with six frames, of which the last was not downloaded."""
    cameras = arc(5, 80.0, 78.0, 48.0, 32.0)
    lines = ["https://www.youtube.com/watch?v=none"]
    for i, camera in enumerate([*cameras, cameras[-1]]):
        stamp = str(1_000_000 + 33_000 * i)
        k = camera.intrinsics
        numbers = [k[0, 0] / WIDTH, k[1, 1] / HEIGHT, k[0, 2] / WIDTH, k[1, 2] / HEIGHT, 0, 0]
        numbers += list(np.asarray(camera.world_to_camera, float)[:3].ravel())
        lines.append(" ".join([stamp, *(f"{n:.9f}" for n in numbers)]))
        if i < 5:
            write_image(folder / clip / f"{stamp}.png", photo(camera))
    (folder / f"{clip}.txt").write_text("\n".join(lines) + "\n")
    return cameras


def write_co3d(root: Path, kind: str = "ndc_isotropic") -> list[Camera]:
    """A category with one sequence, poses as PyTorch3D has them, and masks."""
    cameras = arc(5, 80.0, 76.0, 46.0, 35.0)
    half = np.array([WIDTH, HEIGHT]) / 2
    unit = np.full(2, half.min()) if kind == "ndc_isotropic" else half
    frames = []
    for i, camera in enumerate(cameras):
        name = f"frame{i + 1:06d}"
        write_image(root / f"apple/seq/images/{name}.png", photo(camera))
        mask = np.zeros((HEIGHT, WIDTH), np.uint8)
        mask[: HEIGHT // 2] = 255
        write_image(root / f"apple/seq/masks/{name}.png", mask)
        matrix = np.asarray(camera.world_to_camera, float)
        # PyTorch3D: row vectors, x to the left, y up.
        turned = np.diag([-1, -1, 1]) @ matrix[:3]
        k = np.asarray(camera.intrinsics, float)
        frames.append({
            "sequence_name": "seq", "frame_number": i,
            "image": {"path": f"apple/seq/images/{name}.png", "size": [HEIGHT, WIDTH]},
            "mask": {"path": f"apple/seq/masks/{name}.png", "mass": 1.0},
            "viewpoint": {
                "R": turned[:, :3].T.tolist(), "T": turned[:, 3].tolist(),
                "focal_length": (np.array([k[0, 0], k[1, 1]]) / unit).tolist(),
                "principal_point": ((half - [k[0, 2], k[1, 2]]) / unit).tolist(),
                **({} if kind == "default" else {"intrinsics_format": kind}),
            },
        })  # fmt: skip
    frames.reverse()
    with gzip.open(root / "apple/frame_annotations.jgz", "wt") as file:
        json.dump(frames, file)
    return cameras


def write_mvsnet(folder: Path) -> list[Camera]:
    """images/ and cams/ as MVSNet's Tanks and Temples has them."""
    cameras = arc(5, 80.0, 78.0, 47.0, 33.0)
    names = [f"{i:08d}.png" for i in range(5)]
    _photos(folder / "images", cameras, names)
    (folder / "cams").mkdir()
    for name, camera in zip(names, cameras, strict=True):
        lines = ["extrinsic", *(" ".join(map(str, row)) for row in camera.world_to_camera), ""]
        lines += ["intrinsic", *(" ".join(map(str, row)) for row in camera.intrinsics), ""]
        (folder / "cams" / name.replace(".png", "_cam.txt")).write_text(
            "\n".join([*lines, "0.5 0.01", ""])
        )
    return cameras


def write_mipnerf360(folder: Path) -> list[Camera]:
    """A COLMAP model of the full photos, of which images_4 are 4 times as small."""
    cameras = arc(5, 80.0, 78.0, 47.0, 33.0)
    _photos(folder / "images_4", cameras)
    names = sorted(NAMES)
    large = [camera.resized(4 * WIDTH, 4 * HEIGHT) for camera in cameras]
    shuffled = (3, 1, 0, 4, 2)
    write_colmap(
        folder / "sparse" / "0",
        PosedImages(tuple(names[i] for i in shuffled), tuple(large[i] for i in shuffled)),
    )
    return cameras
