"""Camera files: nerfstudio `transforms.json` and COLMAP sparse models, read and written.

Whatever the file's convention, what comes out is `Camera` (OpenCV axes, world→camera, pixel
centres at +0.5; both formats count pixels that way too):
- transforms.json holds camera→world matrices with OpenGL axes (x right, y up, z back);
- COLMAP holds world→camera quaternions (wxyz) and translations with OpenCV axes.
Only pinhole cameras are taken: lens distortion is refused by name, never dropped silently.
Images are not opened here, except for the header of a frame whose camera states no size.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np

from see3d_jax.errors import InputError
from see3d_jax.files import write_json, write_text
from see3d_jax.geometry.cameras import Camera, intrinsics_matrix
from see3d_jax.geometry.transforms import (
    nearest_rotation,
    quaternion_to_rotation,
    rotation_to_quaternion,
)
from see3d_jax.media import IMAGE_SUFFIXES, image_size

UNDISTORT_HINT = "undistort the images first (e.g. `colmap image_undistorter`)"
_OPENGL_TO_OPENCV = np.diag([1.0, -1.0, -1.0, 1.0])
_DISTORTION_KEYS = ("k1", "k2", "k3", "k4", "k5", "k6", "p1", "p2")
_PINHOLE_NAMES = ("PINHOLE", "SIMPLE_PINHOLE", "OPENCV", "SIMPLE_RADIAL", "RADIAL", "PERSPECTIVE")
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


@dataclasses.dataclass(frozen=True)
class PointCloud:
    """Sparse points: xyz [N, 3] float32 world coordinates, rgb [N, 3] uint8."""

    xyz: np.ndarray
    rgb: np.ndarray


@dataclasses.dataclass(frozen=True)
class PosedImages:
    """What a camera file says about N images.

    Attributes:
      files: N image paths as the file names them (relative to the scene folder).
      cameras: N unbatched cameras (NumPy), possibly of different sizes.
      depth_files, mask_files: N paths, or None when the file names none.
      depth_unit: metres (or scene units) per step of the integer depth maps.
      points: sparse points, if any.
      observations: COLMAP only: per image (pixels [K, 2] float32, point index [K] int64 into
        `points`), the points seen by that image.
      extra: top-level entries of transforms.json that mean nothing here (kept for rewriting).
    """

    files: tuple[str, ...]
    cameras: tuple[Camera, ...]
    depth_files: tuple[str, ...] | None = None
    mask_files: tuple[str, ...] | None = None
    depth_unit: float = 1e-3
    points: PointCloud | None = None
    observations: tuple[tuple[np.ndarray, np.ndarray], ...] | None = None
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("cameras", "depth_files", "mask_files", "observations"):
            value = getattr(self, name)
            if value is not None and len(value) != len(self.files):
                raise ValueError(f"{name}: expected {len(self.files)} entries, got {len(value)}")


# ---------------------------------------------------------------- nerfstudio transforms.json


def read_transforms(path: str | os.PathLike[str]) -> PosedImages:
    """Reads a nerfstudio / instant-ngp / Blender `transforms.json`, frames in file order.

    Intrinsics are taken per frame where given, else from the top level: `fl_x` (and `fl_y`), or
    `camera_angle_x`; `cx`, `cy` default to the image centre and `w`, `h` to the image's size.
    `applied_transform` is ignored: the stored poses have it applied already.
    Raises InputError naming file and field.
    """
    path = Path(path)
    content = _read_json(path)
    frames = content.get("frames") if isinstance(content, dict) else None
    if not isinstance(frames, list) or not frames:
        raise InputError(f"{path}: 'frames' must be a non-empty list (is this a transforms.json?)")
    top = {key: value for key, value in content.items() if key != "frames"}
    files, cameras = [], []
    sides: dict[str, list[str]] = {"depth_file_path": [], "mask_path": []}
    for index, frame in enumerate(frames):
        where = f"{path}: frames[{index}]"
        if not isinstance(frame, dict):
            raise InputError(f"{where} must be an object")
        file = frame.get("file_path", "")
        if not isinstance(file, str):
            raise InputError(f"{where}: file_path must be text, got {file!r}")
        file = _with_suffix(path.parent, file)
        files.append(file)
        cameras.append(_camera_from_frame({**top, **frame}, path.parent / file, where))
        for key, found in sides.items():
            if isinstance(frame.get(key), str):
                found.append(frame[key])
    for key, found in sides.items():
        if len(found) not in (0, len(frames)):
            raise InputError(
                f"{path}: {key} is given for {len(found)} of {len(frames)} frames; all or none"
            )
    unit = _number(top, "depth_unit_scale_factor", path, 1e-3)
    if not unit > 0:
        raise InputError(f"{path}: depth_unit_scale_factor must be > 0, got {unit}")
    known = {"fl_x", "fl_y", "cx", "cy", "w", "h", "camera_angle_x", "camera_angle_y",
             "camera_model", "depth_unit_scale_factor", *_DISTORTION_KEYS}  # fmt: skip
    return PosedImages(
        tuple(files),
        tuple(cameras),
        tuple(sides["depth_file_path"]) or None,
        tuple(sides["mask_path"]) or None,
        unit,
        extra={key: value for key, value in top.items() if key not in known},
    )


def write_transforms(path: str | os.PathLike[str], images: PosedImages) -> None:
    """Writes a nerfstudio transforms.json; intrinsics at the top level when all frames share them.

    Reading it back gives the same intrinsics, and poses equal to float32 rounding.
    """
    intrinsics = [_intrinsics_fields(camera) for camera in images.cameras]
    shared = all(fields == intrinsics[0] for fields in intrinsics)
    content: dict[str, Any] = {"camera_model": "PINHOLE", **(intrinsics[0] if shared else {})}
    if images.depth_files is not None:
        content["depth_unit_scale_factor"] = float(images.depth_unit)
    content.update(images.extra)
    frames = []
    for i, camera in enumerate(images.cameras):
        frame: dict[str, Any] = {"file_path": images.files[i]}
        if images.depth_files is not None:
            frame["depth_file_path"] = images.depth_files[i]
        if images.mask_files is not None:
            frame["mask_path"] = images.mask_files[i]
        if not shared:
            frame.update(intrinsics[i])
        world_to_camera = np.asarray(camera.world_to_camera, np.float64)
        frame["transform_matrix"] = (_rigid_inverse(world_to_camera) @ _OPENGL_TO_OPENCV).tolist()
        frames.append(frame)
    write_json(path, {**content, "frames": frames})


def _camera_from_frame(fields: dict[str, Any], image: Path, where: str) -> Camera:
    model = fields.get("camera_model", "PINHOLE")
    if model not in _PINHOLE_NAMES or fields.get("is_fisheye"):
        raise InputError(f"{where}: camera_model {model} is not a pinhole; {UNDISTORT_HINT}")
    for key in _DISTORTION_KEYS:
        if _number(fields, key, where, 0.0) != 0:
            raise InputError(f"{where}: lens distortion {key} = {fields[key]}; {UNDISTORT_HINT}")
    distortion = fields.get("distortion_params") or [0]
    if not isinstance(distortion, list) or any(value != 0 for value in distortion):
        raise InputError(f"{where}: distortion_params are not zero; {UNDISTORT_HINT}")
    if "w" in fields and "h" in fields:
        width, height = _number(fields, "w", where), _number(fields, "h", where)
    else:
        width, height = image_size(image)
    if "fl_x" in fields or "fl_y" in fields:
        fx = _number(fields, "fl_x" if "fl_x" in fields else "fl_y", where)
        fy = _number(fields, "fl_y", where, fx)
    elif "camera_angle_x" in fields:
        fx = 0.5 * width / math.tan(0.5 * _number(fields, "camera_angle_x", where))
        fy = fx
        if "camera_angle_y" in fields:
            fy = 0.5 * height / math.tan(0.5 * _number(fields, "camera_angle_y", where))
    else:
        raise InputError(f"{where}: no fl_x and no camera_angle_x; the focal length is needed")
    cx, cy = _number(fields, "cx", where, width / 2), _number(fields, "cy", where, height / 2)
    try:
        matrix = np.asarray(fields["transform_matrix"], np.float64)
    except KeyError:
        raise InputError(f"{where}: no transform_matrix") from None
    except (TypeError, ValueError):
        raise InputError(f"{where}: transform_matrix is not a matrix of numbers") from None
    if matrix.shape not in ((4, 4), (3, 4)):
        raise InputError(f"{where}: transform_matrix must be 4×4, got {matrix.shape}")
    camera_to_world = np.eye(4)
    camera_to_world[:3] = matrix[:3]
    world_to_camera = _rigid_inverse(_rigid(camera_to_world @ _OPENGL_TO_OPENCV, where))
    return _camera(fx, fy, cx, cy, width, height, world_to_camera, where)


def _intrinsics_fields(camera: Camera) -> dict[str, float]:
    k = np.asarray(camera.intrinsics, np.float64)
    return {"fl_x": k[0, 0], "fl_y": k[1, 1], "cx": k[0, 2], "cy": k[1, 2],
            "w": camera.width, "h": camera.height}  # fmt: skip


def _with_suffix(folder: Path, file: str) -> str:
    """Blender-style files leave the image suffix out: append the one that exists."""
    if Path(file).suffix.lower() in IMAGE_SUFFIXES:
        return file
    for suffix in IMAGE_SUFFIXES:
        if (folder / (file + suffix)).is_file():
            return file + suffix
    return file


# ------------------------------------------------------------------------- COLMAP sparse models


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
        found.append(_camera(fx, fy, cx, cy, width, height, world_to_camera, where))
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
            tuple(_intrinsics_fields(camera).values()), len(camera_ids) + 1
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


# ------------------------------------------------------------------------------------- shared


def _camera(
    fx: float, fy: float, cx: float, cy: float, width: float, height: float,
    world_to_camera: np.ndarray, where: str,
) -> Camera:  # fmt: skip
    if int(width) != width or int(height) != height or min(width, height) < 1:
        raise InputError(f"{where}: image size must be whole and positive, got {width}×{height}")
    if not (math.isfinite(fx) and math.isfinite(fy) and fx > 0 and fy > 0):
        raise InputError(f"{where}: focal lengths must be positive, got {fx}, {fy}")
    return Camera(
        intrinsics_matrix(fx, fy, cx, cy),
        world_to_camera.astype(np.float32),
        int(width),
        int(height),
    )


def _rigid(matrix: np.ndarray, where: str) -> np.ndarray:
    """Cleans a rotation of print rounding; refuses matrices that are no rigid motion."""
    if not np.all(np.isfinite(matrix)):
        raise InputError(f"{where}: transform_matrix holds NaN or infinity")
    rotation = nearest_rotation(matrix[:3, :3])
    if np.abs(rotation - matrix[:3, :3]).max() > 1e-2:
        raise InputError(f"{where}: transform_matrix is not rigid (scaled, sheared or mirrored)")
    cleaned = matrix.copy()
    cleaned[:3, :3] = rotation
    return cleaned


def _rigid_inverse(matrix: np.ndarray) -> np.ndarray:
    inverse = np.eye(4)
    inverse[:3, :3] = matrix[:3, :3].T
    inverse[:3, 3] = -matrix[:3, :3].T @ matrix[:3, 3]
    return inverse


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error})") from error


def _number(fields: dict, key: str, where: Any, default: float | None = None) -> float:
    value = fields.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InputError(f"{where}: {key} must be a finite number, got {value!r}")
    return float(value)
