"""COLMAP sparse models (.bin and .txt): cameras, poses, points and what was seen where.

COLMAP holds world→camera quaternions (wxyz) and translations with OpenCV axes and counts pixel
centres at +0.5, as `Camera` does. Only pinhole cameras are taken: lens distortion is refused by
name, never dropped silently. Images are not opened here.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any

import numpy as np

from see3d_jax.errors import InputError
from see3d_jax.files import write_text
from see3d_jax.geometry.scene_files import (
    UNDISTORT_HINT,
    PointCloud,
    PosedImages,
    camera_from,
    intrinsics_fields,
)
from see3d_jax.geometry.transforms import quaternion_to_rotation, rotation_to_quaternion

# COLMAP model id -> (name, number of parameters, how many of the first are f/fx fy/cx cy)
_COLMAP_MODELS = {
    0: ("SIMPLE_PINHOLE", 3, 3),
    1: ("PINHOLE", 4, 4),
    2: ("SIMPLE_RADIAL", 4, 3),
    3: ("RADIAL", 5, 3),
    4: ("OPENCV", 8, 4),
    5: ("OPENCV_FISHEYE", 8, None),
    6: ("FULL_OPENCV", 12, 4),
    7: ("FOV", 5, None),
    8: ("SIMPLE_RADIAL_FISHEYE", 4, None),
    9: ("RADIAL_FISHEYE", 5, None),
    10: ("THIN_PRISM_FISHEYE", 12, None),
}


def find_colmap_model(folder: str | os.PathLike[str]) -> Path | None:
    """The sparse model of a scene folder: itself, `sparse/0`, `sparse`, or below `colmap/`."""
    for place in ("sparse/0", "sparse", "colmap/sparse/0", "colmap/sparse", "."):
        candidate = Path(folder) / place
        if any((candidate / f"cameras.{kind}").is_file() for kind in ("bin", "txt")):
            return candidate
    return None


def read_colmap(folder: str | os.PathLike[str]) -> PosedImages:
    """Reads cameras, images and points3D (.bin, else .txt) of a COLMAP model, sorted by image name.

    Distorted cameras are refused. A missing points3D file leaves `points` None.
    Raises InputError naming the file.
    """
    folder = Path(folder)
    kind = "bin" if (folder / "cameras.bin").is_file() else "txt"
    binary = kind == "bin"
    cameras_path, images_path, points_path = (
        folder / f"{name}.{kind}" for name in ("cameras", "images", "points3D")
    )
    cameras = _parse(cameras_path, _cameras_bin if binary else _cameras_txt)
    images = _parse(images_path, _images_bin if binary else _images_txt)
    if not images:
        raise InputError(f"{images_path}: holds no registered image")
    points = None
    point_index: dict[int, int] = {}
    if points_path.is_file():
        ids, xyz, rgb = _parse(points_path, _points_bin if binary else _points_txt)
        order = np.argsort(ids)
        points = PointCloud(xyz[order].astype(np.float32), rgb[order].astype(np.uint8))
        point_index = {int(ids[i]): n for n, i in enumerate(order)}
    files, found, observations = [], [], []
    for name, camera_id, pose, pixels, point_ids in sorted(images, key=lambda image: image[0]):
        where = f"{images_path}: {name}"
        if camera_id not in cameras:
            raise InputError(f"{where}: camera {camera_id} is not in {cameras_path.name}")
        if not np.all(np.isfinite(pose)) or np.linalg.norm(pose[:4]) < 1e-6:
            raise InputError(f"{where}: the pose is not finite or its quaternion is zero")
        world_to_camera = np.eye(4)
        world_to_camera[:3, :3] = quaternion_to_rotation(pose[:4])
        world_to_camera[:3, 3] = pose[4:]
        model, width, height, params = cameras[camera_id]
        fx, fy, cx, cy = _pinhole(model, params, f"{cameras_path}: camera {camera_id}")
        files.append(name)
        found.append(camera_from(fx, fy, cx, cy, width, height, world_to_camera, where))
        seen = [point_index.get(int(i), -1) for i in point_ids]
        index = np.array(seen, np.int64)
        observations.append((pixels[index >= 0].astype(np.float32), index[index >= 0]))
    return PosedImages(
        tuple(files), tuple(found), points=points,
        observations=tuple(observations) if points is not None else None,
    )  # fmt: skip


def write_colmap(folder: str | os.PathLike[str], images: PosedImages) -> None:
    """Writes cameras.txt, images.txt and points3D.txt (one PINHOLE camera per distinct intrinsics).

    File names are stored without a leading `images/`, because COLMAP resolves them from there.
    """
    folder = Path(folder)
    camera_ids: dict[tuple, int] = {}
    image_lines = ["# IMAGE_ID QW QX QY QZ TX TY TZ CAMERA_ID NAME; then X Y POINT3D_ID triples"]
    tracks: dict[int, list[str]] = {}
    for i, camera in enumerate(images.cameras):
        camera_id = camera_ids.setdefault(
            tuple(intrinsics_fields(camera).values()), len(camera_ids) + 1
        )
        world_to_camera = np.asarray(camera.world_to_camera, np.float64)
        quaternion = rotation_to_quaternion(world_to_camera[:3, :3])
        pose = " ".join(repr(float(v)) for v in (*quaternion, *world_to_camera[:3, 3]))
        name = images.files[i].removeprefix("./").removeprefix("images/")
        image_lines.append(f"{i + 1} {pose} {camera_id} {name}")
        line = []
        if images.observations is not None:
            for slot, (pixel, point) in enumerate(zip(*images.observations[i], strict=True)):
                line.append(f"{float(pixel[0])!r} {float(pixel[1])!r} {int(point) + 1}")
                tracks.setdefault(int(point), []).append(f"{i + 1} {slot}")
        image_lines.append(" ".join(line))
    camera_lines = ["# CAMERA_ID MODEL WIDTH HEIGHT fx fy cx cy"]
    for (fx, fy, cx, cy, width, height), camera_id in camera_ids.items():
        camera_lines.append(
            f"{camera_id} PINHOLE {width} {height} "
            + " ".join(repr(float(v)) for v in (fx, fy, cx, cy))
        )
    point_lines = ["# POINT3D_ID X Y Z R G B ERROR, then IMAGE_ID POINT2D_INDEX pairs"]
    if images.points is not None:
        for n, (xyz, rgb) in enumerate(zip(images.points.xyz, images.points.rgb, strict=True)):
            where = " ".join(repr(float(v)) for v in xyz)
            colour = " ".join(str(int(v)) for v in rgb)
            track = " ".join(tracks.get(n, []))
            point_lines.append(f"{n + 1} {where} {colour} 0 {track}".rstrip())
    for name, lines in (
        ("cameras", camera_lines), ("images", image_lines), ("points3D", point_lines)
    ):  # fmt: skip
        write_text(folder / f"{name}.txt", "\n".join(lines) + "\n")


def _pinhole(model: str, params: np.ndarray, where: str) -> tuple[float, float, float, float]:
    count = next((m[2] for m in _COLMAP_MODELS.values() if m[0] == model), None)
    if count is None:
        raise InputError(f"{where}: camera model {model} is not a pinhole; {UNDISTORT_HINT}")
    if np.any(params[count:] != 0):
        raise InputError(
            f"{where}: {model} with distortion {params[count:].tolist()}; {UNDISTORT_HINT}"
        )
    if count == 3:
        return params[0], params[0], params[1], params[2]
    return params[0], params[1], params[2], params[3]


def _parse(path: Path, parser: Any) -> Any:
    """Runs a parser over a file's content; foreign or cut-off content is one clear line."""
    try:
        return parser(path.read_bytes())
    except FileNotFoundError:
        raise InputError(f"{path}: no such file (a COLMAP model needs it)") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except (struct.error, ValueError, IndexError, KeyError) as error:
        raise InputError(f"{path}: not a COLMAP file, or cut off ({error})") from error


class _Reader:
    """Reads little-endian values off a byte string, refusing to run past its end."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, layout: str) -> tuple:
        values = struct.unpack_from("<" + layout, self.data, self.at)
        self.at += struct.calcsize("<" + layout)
        return values

    def array(self, dtype: list | str, count: int) -> np.ndarray:
        values = np.frombuffer(self.data, dtype, count, self.at)
        self.at += values.nbytes
        return values

    def text(self) -> str:
        end = self.data.index(b"\0", self.at)
        value = self.data[self.at : end].decode()
        self.at = end + 1
        return value


def _cameras_bin(data: bytes) -> dict[int, tuple[str, int, int, np.ndarray]]:
    reader = _Reader(data)
    cameras = {}
    for _ in range(reader.take("Q")[0]):
        camera_id, model_id, width, height = reader.take("iiQQ")
        if model_id not in _COLMAP_MODELS:
            raise ValueError(f"camera model number {model_id} is unknown")
        name, count, _ = _COLMAP_MODELS[model_id]
        cameras[camera_id] = (name, width, height, reader.array("<f8", count))
    return cameras


def _images_bin(data: bytes) -> list[tuple[str, int, np.ndarray, np.ndarray, np.ndarray]]:
    reader = _Reader(data)
    images = []
    for _ in range(reader.take("Q")[0]):
        reader.take("i")  # image id: names are unique already
        pose = reader.array("<f8", 7)
        (camera_id,) = reader.take("i")
        name = reader.text()
        seen = reader.array([("xy", "<f8", 2), ("id", "<i8")], reader.take("Q")[0])
        images.append((name, camera_id, pose, seen["xy"], seen["id"]))
    return images


def _points_bin(data: bytes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    reader = _Reader(data)
    (count,) = reader.take("Q")
    if count * 51 > len(data):
        raise ValueError(f"states {count} points in {len(data)} bytes")
    ids, xyz, rgb = np.zeros(count, np.int64), np.zeros((count, 3)), np.zeros((count, 3), np.uint8)
    for n in range(count):
        values = reader.take("Q3d3BdQ")
        ids[n], xyz[n], rgb[n] = values[0], values[1:4], values[4:7]
        reader.at += 8 * values[8]  # the track: the images hold the same pairs
    return ids, xyz, rgb


def _lines(data: bytes) -> list[list[str]]:
    text = data.decode()
    return [line.split() for line in text.splitlines() if not line.startswith("#")]


def _cameras_txt(data: bytes) -> dict[int, tuple[str, int, int, np.ndarray]]:
    return {
        int(words[0]): (words[1], int(words[2]), int(words[3]), np.array(words[4:], np.float64))
        for words in _lines(data)
        if words
    }


def _images_txt(data: bytes) -> list[tuple[str, int, np.ndarray, np.ndarray, np.ndarray]]:
    lines = _lines(data)  # blank lines stay: an image without observations has one
    images = []
    at = 0
    while at < len(lines):
        words = lines[at]
        at += 1
        if not words:
            continue
        if len(words) < 10:
            raise ValueError(f"an image line has {len(words)} entries, expected 10")
        seen = np.array(lines[at] if at < len(lines) else [], np.float64).reshape(-1, 3)
        at += 1
        pose = np.array(words[1:8], np.float64)
        name = " ".join(words[9:])
        images.append((name, int(words[8]), pose, seen[:, :2], seen[:, 2].astype(np.int64)))
    return images


def _points_txt(data: bytes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rows = np.array([words[:7] for words in _lines(data) if words], np.float64).reshape(-1, 7)
    return rows[:, 0].astype(np.int64), rows[:, 1:4], rows[:, 4:7].astype(np.uint8)
