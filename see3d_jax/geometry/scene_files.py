"""Camera files: nerfstudio `transforms.json` and INRIA `cameras.json`, both read and written.

Whatever the file's convention, what comes out is `Camera` (OpenCV axes, world→camera, pixel
centres at +0.5; all formats count pixels that way too):
- transforms.json holds camera→world matrices with OpenGL axes (x right, y up, z back);
- cameras.json of 3D Gaussian Splatting holds camera→world rotations and positions, OpenCV axes.
COLMAP models are in `colmap_files`. Only pinhole cameras are taken: lens distortion is refused by
name, never dropped silently. Images are not opened here, except
for the header of a frame whose camera states no size.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from see3d_jax.errors import InputError
from see3d_jax.files import write_json
from see3d_jax.geometry.cameras import Camera, intrinsics_matrix
from see3d_jax.geometry.transforms import nearest_rotation
from see3d_jax.media import IMAGE_SUFFIXES, image_size

UNDISTORT_HINT = "undistort the images first (e.g. `colmap image_undistorter`)"
_OPENGL_TO_OPENCV = np.diag([1.0, -1.0, -1.0, 1.0])
_DISTORTION_KEYS = ("k1", "k2", "k3", "k4", "k5", "k6", "p1", "p2")
_PINHOLE_NAMES = ("PINHOLE", "SIMPLE_PINHOLE", "OPENCV", "SIMPLE_RADIAL", "RADIAL", "PERSPECTIVE")


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
    intrinsics = [intrinsics_fields(camera) for camera in images.cameras]
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
    world_to_camera = _rigid_inverse(
        _rigid(camera_to_world @ _OPENGL_TO_OPENCV, f"{where}: transform_matrix")
    )
    return camera_from(fx, fy, cx, cy, width, height, world_to_camera, where)


def intrinsics_fields(camera: Camera) -> dict[str, float]:
    """Focal lengths, principal point and size under their names in transforms.json."""
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


# ------------------------------------------------------------------------- INRIA cameras.json


def read_inria_cameras(path: str | os.PathLike[str]) -> PosedImages:
    """Reads the `cameras.json` that the official 3D Gaussian Splatting code writes, in file order.

    Each entry has `img_name` (often without suffix), `width`, `height`, `fx`, `fy`, `position` (the
    camera's centre) and `rotation` (camera→world, OpenCV axes). The principal point is `cx`, `cy`
    in files of ours; the official code stores none: it is the image centre. Raises InputError
    naming file and field.
    """
    path = Path(path)
    content = _read_json(path)
    if not isinstance(content, list) or not content:
        raise InputError(f"{path}: must be a non-empty list of cameras (is this a cameras.json?)")
    files, cameras = [], []
    for index, fields in enumerate(content):
        where = f"{path}: [{index}]"
        if not isinstance(fields, dict) or not isinstance(fields.get("img_name"), str):
            raise InputError(f"{where}: must be an object with an img_name")
        width, height, fx, fy = (_number(fields, k, where) for k in ("width", "height", "fx", "fy"))
        camera_to_world = np.eye(4)
        for key, part in (("rotation", np.s_[:3, :3]), ("position", np.s_[:3, 3])):
            try:
                value = np.asarray(fields.get(key), np.float64)
            except (TypeError, ValueError):
                value = np.empty(0)
            if value.shape != camera_to_world[part].shape:
                raise InputError(
                    f"{where}: {key} must be numbers of shape {camera_to_world[part].shape}"
                )
            camera_to_world[part] = value
        world_to_camera = _rigid_inverse(_rigid(camera_to_world, f"{where}: rotation"))
        files.append(_with_suffix(path.parent / "images", fields["img_name"]))
        cx = _number(fields, "cx", where, width / 2)
        cy = _number(fields, "cy", where, height / 2)
        cameras.append(camera_from(fx, fy, cx, cy, width, height, world_to_camera, where))
    return PosedImages(tuple(files), tuple(cameras))


def write_inria_cameras(path: str | os.PathLike[str], images: PosedImages) -> None:
    """Writes the `cameras.json` that viewers of 3DGS scenes look for beside the point cloud.

    Beyond the official fields each entry has `cx` and `cy`, which other readers ignore, so that
    `read_inria_cameras` gives the same cameras back to float32 rounding.
    """
    entries = []
    for index, (file, camera) in enumerate(zip(images.files, images.cameras, strict=True)):
        camera_to_world = _rigid_inverse(np.asarray(camera.world_to_camera, np.float64))
        k = intrinsics_fields(camera)
        entries.append({
            "id": index, "img_name": file, "width": k["w"], "height": k["h"],
            "position": camera_to_world[:3, 3].tolist(),
            "rotation": camera_to_world[:3, :3].tolist(),
            "fx": k["fl_x"], "fy": k["fl_y"], "cx": k["cx"], "cy": k["cy"],
        })  # fmt: skip
    write_json(path, entries)


# ------------------------------------------------------------------------------------- shared


def camera_from(
    fx: float, fy: float, cx: float, cy: float, width: float, height: float,
    world_to_camera: np.ndarray, where: str,
) -> Camera:  # fmt: skip
    """A checked Camera; InputError begins with `where` (the file and its entry)."""
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
        raise InputError(f"{where} holds NaN or infinity")
    rotation = nearest_rotation(matrix[:3, :3])
    if np.abs(rotation - matrix[:3, :3]).max() > 1e-2:
        raise InputError(f"{where} is not rigid (scaled, sheared or mirrored)")
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
