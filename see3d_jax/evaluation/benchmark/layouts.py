"""Scenes of the published benchmarks, read from the files as they are distributed.

    LLFF            poses_bounds.npy beside images/, images_4/, images_8/
    DTU             cameras.npz beside image/ (the layout of DVR, pixelNeRF and IDR), masks
    RealEstate10K   CLIP.txt of the release, frames called TIMESTAMP.png or .jpg
    CO3D            CATEGORY/frame_annotations.jgz, CATEGORY/SEQUENCE/{images,masks,depths}/
    MVSNet          images/ and cams/NAME_cam.txt (Tanks and Temples as MVSNet ships it)
    COLMAP          sparse/0 beside images/, images_2/, images_4/, images_8/ (Mip-NeRF 360)

Whatever the file's convention, what comes out is a `Scene` with cameras as everywhere (OpenCV axes,
world→camera, pixel centres at +0.5), its frames sorted by file name. Sparse points are left out on
purpose: they were found with the views that are to be predicted. Errors are InputErrors that name
the file.
"""

from __future__ import annotations

import gzip
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.linalg import rq

from see3d_jax.errors import InputError
from see3d_jax.geometry.cameras import Camera, intrinsics_matrix
from see3d_jax.geometry.colmap_files import find_colmap_model, read_colmap
from see3d_jax.geometry.transforms import nearest_rotation
from see3d_jax.media import IMAGE_SUFFIXES, image_size
from see3d_jax.pipelines.inputs import Scene, unique_names

# Of several sizes of the same photos the smallest is read whose shorter side has this many pixels,
# those of the model in full (512): smaller photos cost less to read and alias less.
ENOUGH_PIXELS = 512


def read_llff(folder: Path) -> Scene:
    """A scene of LLFF: row i of poses_bounds.npy belongs to the i-th photo by name.

    A row is a 3 × 5 matrix [R | t | (height, width, focal)] and two depth bounds; R holds the
    camera's axes in the world as (down, right, back); the principal point is the image centre.
    """
    file = folder / "poses_bounds.npy"
    rows = _numbers(file)
    if rows.ndim != 2 or rows.shape[1] != 17:
        raise InputError(f"{file}: expected [photos, 17], got {list(rows.shape)}")
    paths = _photo_sizes(folder)
    if len(paths) != len(rows):
        raise InputError(f"{file}: has {len(rows)} poses for {len(paths)} photos in {paths[0]}")
    cameras = []
    for path, row in zip(paths, rows, strict=True):
        matrix = row[:15].reshape(3, 5)
        down, right, back = matrix[:, 0], matrix[:, 1], matrix[:, 2]
        height, width, focal = matrix[:, 4]
        rotation = np.stack([right, down, -back])  # rows: the OpenCV axes
        intrinsics = intrinsics_matrix(focal, focal, width / 2, height / 2)
        cameras.append(_camera(intrinsics, rotation, -rotation @ matrix[:, 3], width, height, path))
    return _scene(folder, paths, cameras)


def read_dtu(folder: Path, mask_folders: Sequence[Path] = ()) -> Scene:
    """A scan of DTU: world_mat_i of cameras.npz is K·[R | t] of the i-th picture by name.

    scale_mat_i (where there is one) maps a unit space to the world; the scene is given in that
    space, as pixelNeRF and IDR do. The matrices may be those of pictures 2 or 4 times as large.

    Args:
      folder: holds cameras.npz and image/ (or images/).
      mask_folders: where the object masks may be: the first that exists and has as many is taken;
        default SCAN/mask.
    """
    file = folder / "cameras.npz"
    try:
        with np.load(file) as arrays:
            matrices = {name: np.asarray(arrays[name], np.float64) for name in arrays.files}
    except FileNotFoundError:
        raise InputError(f"{file}: no such file (the cameras of a DTU scan)") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{file}: cannot be read as .npz ({error})") from error
    paths = _photos(folder / "image") or _photos(folder / "images")
    if not paths:
        raise InputError(f"{folder / 'image'}: holds no pictures")
    cameras = []
    for i, path in enumerate(paths):
        where = f"{file}: world_mat_{i}"
        if f"world_mat_{i}" not in matrices or matrices[f"world_mat_{i}"].shape not in (
            (4, 4), (3, 4)
        ):  # fmt: skip
            raise InputError(f"{where}: a 4×4 matrix is needed for {path.name}")
        intrinsics, rotation, centre = _decompose(matrices[f"world_mat_{i}"][:3], where)
        scale = matrices.get(f"scale_mat_{i}")
        if scale is not None:  # a uniform scale and a translation
            centre = (centre - scale[:3, 3]) / scale[0, 0]
        width, height = image_size(path)
        larger = max(1, round(2 * intrinsics[0, 2] / width))  # the principal point is near centre
        cameras.append(
            _camera(intrinsics, rotation, -rotation @ centre, larger * width, larger * height, path)
        )
    masks = next(
        (found for place in (*mask_folders, folder / "mask")
         if len(found := _photos(place)) == len(paths)), None,
    )  # fmt: skip
    return _scene(folder, paths, cameras, masks=masks)


def read_realestate(file: Path, frame_folder: Path) -> Scene:
    """A clip of RealEstate10K: one line per frame after the line with the video's address.

    A line is timestamp (µs), fx fy cx cy (in shares of width and height), two zeros, and the 3 × 4
    world→camera matrix (OpenCV axes). Frames are files called by the timestamp; lines whose frame
    was not downloaded are left out.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: cannot be read ({error})") from error
    frames = {path.stem: path for path in _photos(frame_folder)}
    paths, cameras = [], []
    for number, line in enumerate(lines[1:], start=2):
        words = line.split()
        if not words:
            continue
        try:
            values = np.array([float(word) for word in words[1:]])
        except ValueError:
            values = np.empty(0)
        if len(values) != 18:
            raise InputError(f"{file}: line {number}: expected a timestamp and 18 numbers")
        path = frames.get(words[0])
        if path is None:
            continue
        width, height = image_size(path)
        fx, fy, cx, cy = values[:4] * (width, height, width, height)
        matrix = values[6:].reshape(3, 4)
        intrinsics = intrinsics_matrix(fx, fy, cx, cy)
        cameras.append(_camera(intrinsics, matrix[:, :3], matrix[:, 3], width, height, path))
        paths.append(path)
    if len(paths) < 2:
        raise InputError(f"{frame_folder}: holds {len(paths)} of the frames that {file} lists")
    return _scene(frame_folder, paths, cameras)


def read_co3d_category(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The frames of every sequence of a CO3D category, from its frame_annotations.jgz."""
    file = folder / "frame_annotations.jgz"
    try:
        with gzip.open(file, "rt", encoding="utf-8") as stream:
            frames = json.load(stream)
        sequences: dict[str, list[dict[str, Any]]] = {}
        for frame in sorted(frames, key=lambda frame: frame["frame_number"]):
            sequences.setdefault(frame["sequence_name"], []).append(frame)
    except (OSError, ValueError, EOFError, KeyError, TypeError) as error:
        raise InputError(f"{file}: no frame annotations of CO3D ({error})") from error
    return sequences


def read_co3d(root: Path, frames: list[dict[str, Any]]) -> Scene:
    """A sequence of CO3D; `root` is what the paths in its annotations are relative to.

    R and T are PyTorch3D's: x_camera = x_world·R + T with x to the left and y up. Focal length and
    principal point are in shares of half the image: of its shorter side ("ndc_isotropic"), or of
    each side by itself ("ndc_norm_image_bounds", the default).
    """
    paths, cameras, masks = [], [], []
    for frame in frames:
        try:
            path = root / frame["image"]["path"]
            height, width = frame["image"]["size"]
            view = frame["viewpoint"]
            kind = view.get("intrinsics_format", "ndc_norm_image_bounds").lower()
            half = np.array([width, height]) / 2
            unit = {"ndc_isotropic": half.min(), "ndc_norm_image_bounds": half}.get(kind)
            if unit is None:
                raise InputError(f"{path}: unknown intrinsics_format {kind!r}")
            focal = np.asarray(view["focal_length"], np.float64) * unit
            centre = half - np.asarray(view["principal_point"], np.float64) * unit
            flip = np.diag([-1.0, -1.0, 1.0])
            rotation = flip @ np.asarray(view["R"], np.float64).T
            translation = flip @ np.asarray(view["T"], np.float64)
            mask = (frame.get("mask") or {}).get("path")
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{root}: a frame annotation of CO3D lacks {error}") from error
        cameras.append(
            _camera(intrinsics_matrix(*focal, *centre), rotation, translation, width, height, path)
        )
        paths.append(path)
        masks.append(root / mask if mask else None)
    whole = all(mask is not None and mask.is_file() for mask in masks)
    return _scene(paths[0].parent.parent, paths, cameras, masks=masks if whole else None)


def read_mvsnet(folder: Path) -> Scene:
    """A scene with cams/NAME_cam.txt for every images/NAME.jpg.

    A camera file holds, after the word "extrinsic", the 4 × 4 world→camera matrix, and after
    "intrinsic" the 3 × 3 matrix in pixels.
    """
    paths = _photos(folder / "images")
    if not paths:
        raise InputError(f"{folder / 'images'}: holds no pictures")
    cameras = []
    for path in paths:
        file = folder / "cams" / f"{path.stem}_cam.txt"
        try:
            words = file.read_text(encoding="utf-8").split()
            first, second = words.index("extrinsic") + 1, words.index("intrinsic") + 1
            extrinsic = np.array(words[first : first + 16], np.float64).reshape(4, 4)
            intrinsic = np.array(words[second : second + 9], np.float64).reshape(3, 3)
        except FileNotFoundError:
            raise InputError(f"{file}: no such file (the camera of {path.name})") from None
        except (OSError, ValueError) as error:
            raise InputError(f"{file}: no camera of MVSNet ({error})") from error
        width, height = image_size(path)
        cameras.append(_camera(intrinsic, extrinsic[:3, :3], extrinsic[:3, 3], width, height, path))
    return _scene(folder, paths, cameras)


def read_colmap_photos(folder: Path) -> Scene:
    """A COLMAP model with its photos, in the size that is enough (see `ENOUGH_PIXELS`)."""
    model = find_colmap_model(folder)
    if model is None:
        raise InputError(f"{folder}: no COLMAP model (sparse/0 with cameras.bin or .txt)")
    posed = read_colmap(model)
    place = _photo_sizes(folder)[0].parent
    paths, cameras = [], []
    for name, camera in zip(posed.files, posed.cameras, strict=True):
        path = next(
            (p for p in (place / name, (place / name).with_suffix(".png"), folder / "images" / name)
             if p.is_file()), None,
        )  # fmt: skip
        if path is None:
            raise InputError(f"{model}: image {place / name} does not exist")
        paths.append(path)
        cameras.append(camera.resized(*image_size(path)))
    return _scene(folder, paths, cameras)


# --- shared -------------------------------------------------------------------------------------


def _scene(
    root: Path, paths: list[Path], cameras: list[Camera], masks: list[Path] | None = None
) -> Scene:
    return Scene(
        root=root,
        names=unique_names([str(path) for path in paths]),
        image_paths=tuple(paths),
        cameras=tuple(cameras),
        mask_paths=None if masks is None else tuple(masks),
    )


def _camera(
    intrinsics: np.ndarray, rotation: np.ndarray, translation: np.ndarray,
    width: float, height: float, path: Path,
) -> Camera:  # fmt: skip
    """A camera calibrated for width × height, resized to the picture at `path`."""
    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = rotation, translation
    if not (np.isfinite(matrix).all() and np.isfinite(intrinsics).all()):
        raise InputError(f"{path}: its camera holds NaN or infinity")
    matrix[:3, :3] = nearest_rotation(matrix[:3, :3])
    if np.abs(matrix[:3, :3] - rotation).max() > 1e-2:
        raise InputError(f"{path}: the rotation of its camera is scaled, sheared or mirrored")
    if intrinsics[0, 0] <= 0 or intrinsics[1, 1] <= 0:
        raise InputError(f"{path}: its camera has a focal length that is not positive")
    camera = Camera(
        np.asarray(intrinsics, np.float32), matrix.astype(np.float32), int(width), int(height)
    )
    return camera.resized(*image_size(path))


def _decompose(projection: np.ndarray, where: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """K (with K[2, 2] = 1), R (world→camera) and the centre of P = s·K·[R | t]."""
    if not np.isfinite(projection).all() or abs(np.linalg.det(projection[:, :3])) < 1e-12:
        raise InputError(f"{where}: is not a projection matrix")
    left = projection[:, :3] * np.sign(np.linalg.det(projection[:, :3]))
    intrinsics, rotation = rq(left)
    signs = np.diag(np.sign(np.diag(intrinsics)))
    intrinsics, rotation = intrinsics @ signs, signs @ rotation
    centre = -np.linalg.solve(projection[:, :3], projection[:, 3])
    k = intrinsics / intrinsics[2, 2]
    if abs(k[0, 1]) > 1e-3 * k[0, 0]:
        raise InputError(f"{where}: its pixels are skewed; only pinhole cameras are taken")
    return intrinsics_matrix(k[0, 0], k[1, 1], k[0, 2], k[1, 2]), rotation, centre


def _photos(folder: Path) -> list[Path]:
    """The pictures of a folder by name; none where there is no such folder."""
    if not folder.is_dir():
        return []
    return sorted(
        path for path in folder.iterdir()
        if path.suffix.lower() in IMAGE_SUFFIXES and path.name[0] != "."
    )  # fmt: skip


def _photo_sizes(folder: Path) -> list[Path]:
    """The photos of images_8, images_4, images_2 or images, whichever is small but enough."""
    found = [photos for n in (8, 4, 2) if (photos := _photos(folder / f"images_{n}"))]
    found += [photos] if (photos := _photos(folder / "images")) else []
    if not found:
        raise InputError(f"{folder}: no photos in images, images_2, images_4 or images_8")
    enough = [photos for photos in found if min(image_size(photos[0])) >= ENOUGH_PIXELS]
    return (enough or found[-1:])[0]


def _numbers(file: Path) -> np.ndarray:
    try:
        return np.asarray(np.load(file, allow_pickle=False), np.float64)
    except FileNotFoundError:
        raise InputError(f"{file}: no such file") from None
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{file}: cannot be read as .npy ({error})") from error
