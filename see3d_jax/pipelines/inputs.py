"""What the user gives: photos, posed scene folders and depth files, checked at the door.

A scene folder holds images with a nerfstudio `transforms.json`, a COLMAP sparse model or an INRIA
`cameras.json`, and optionally `splits.json` ({"test": [frame indices], …}). Everything wrong
with a file is an InputError that names it; behind this module data is known to be well-formed.

Images are uint8 RGB [H, W, 3] as stored; depth is float32 [H, W], planar z, 0 = unknown;
masks are bool [H, W], True = use.
"""

from __future__ import annotations

import dataclasses
import json
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from see3d_jax.errors import InputError
from see3d_jax.geometry.cameras import Camera
from see3d_jax.geometry.colmap_files import find_colmap_model, read_colmap
from see3d_jax.geometry.scene_files import PosedImages, read_inria_cameras, read_transforms
from see3d_jax.media import IMAGE_SUFFIXES, image_size, read_alpha, read_image

_VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v")
DEPTH_SUFFIXES = (".npy", ".npz", ".png", ".exr", ".pfm")


@dataclasses.dataclass(frozen=True)
class Scene:
    """N posed images of one static scene, still on disk.

    Attributes:
      root: the scene folder.
      names: N file stems, unique, for naming outputs.
      image_paths: N existing files.
      cameras: N cameras of the stored image sizes.
      depth_paths, mask_paths: N files, or None.
      depth_unit: scene units per step of integer depth maps.
      points: (xyz [P, 3] float32, rgb [P, 3] uint8) sparse points, or None.
      splits: name → frame indices, from splits.json, or None.
      observations: per image (pixels [K, 2], indices into points [K]), or None.
    """

    root: Path
    names: tuple[str, ...]
    image_paths: tuple[Path, ...]
    cameras: tuple[Camera, ...]
    depth_paths: tuple[Path, ...] | None = None
    depth_unit: float = 1e-3
    mask_paths: tuple[Path, ...] | None = None
    points: tuple[np.ndarray, np.ndarray] | None = None
    splits: dict[str, tuple[int, ...]] | None = None
    observations: tuple[tuple[np.ndarray, np.ndarray], ...] | None = None

    def __len__(self) -> int:
        return len(self.names)

    def held_out(self, every: int = 8) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(training indices, test indices): splits.json's `test`, else every `every`-th view.

        Training is `train_all` where splits.json has it, else everything that is not test.
        """
        splits = self.splits or {}
        test = splits.get("test", tuple(range(0, len(self), every)))
        rest = tuple(i for i in range(len(self)) if i not in set(test))
        return splits.get("train_all", rest), test


def load_scene(folder: str | os.PathLike[str]) -> Scene:
    """Opens a scene folder, or the transforms.json or cameras.json in it.

    Of a folder's camera files transforms.json wins, then a COLMAP model, then cameras.json.

    Raises InputError naming what is missing: the cameras, an image, a depth map, a bad split.
    """
    root = Path(folder)
    source = root if root.suffix == ".json" else _camera_source(root)
    root = root.parent if root.suffix == ".json" else root
    if root.is_file():
        check_photo(root)
        raise InputError(f"{root}: is one photo; a folder of posed views is needed")
    if not root.is_dir():
        raise InputError(f"{root}: no such folder")
    if source is None:
        raise InputError(
            f"{root}: no cameras found; expected transforms.json (nerfstudio), sparse/0 (COLMAP) "
            "or cameras.json (INRIA)"
        )
    if source.suffix == ".json":
        inria = source.name == "cameras.json"
        posed = (read_inria_cameras if inria else read_transforms)(source)
        image_folders = (root / "images", root) if inria else (root,)
    else:
        posed, image_folders = read_colmap(source), (root / "images", root)
    return Scene(
        root=root,
        names=unique_names(posed.files),
        image_paths=_existing(posed.files, image_folders, source, "image"),
        cameras=posed.cameras,
        depth_paths=posed.depth_files and _existing(posed.depth_files, (root,), source, "depth"),
        depth_unit=posed.depth_unit,
        mask_paths=posed.mask_files and _existing(posed.mask_files, (root,), source, "mask"),
        points=posed.points and (posed.points.xyz, posed.points.rgb),
        splits=_read_splits(root / "splits.json", posed),
        observations=posed.observations,
    )


def has_cameras(folder: Path) -> bool:
    """Whether the folder holds any of the camera files that `load_scene` reads."""
    return _camera_source(folder) is not None


def _camera_source(root: Path) -> Path | None:
    """The camera file, or folder of a COLMAP model, that counts for a scene folder."""
    if (root / "transforms.json").is_file():
        return root / "transforms.json"
    if (model := find_colmap_model(root)) is not None:
        return model
    # Beside a point_cloud.ply they are those of a fitted scene, whose photos are elsewhere.
    fitted = (root / "point_cloud.ply").is_file()
    return root / "cameras.json" if (root / "cameras.json").is_file() and not fitted else None


def load_images(
    scene: Scene, indices: tuple[int, ...] | None = None, max_size: int | None = None
) -> tuple[list[np.ndarray], list[Camera]]:
    """Images of a scene and their cameras, downsized together so that no side exceeds `max_size`.

    Returns uint8 [H, W, 3] arrays and cameras of exactly these sizes. A file whose size is not the
    camera's is refused: the intrinsics would be wrong by an unknown amount.
    """
    images, cameras = [], []
    for i in range(len(scene)) if indices is None else indices:
        path, camera = scene.image_paths[i], scene.cameras[i]
        size = image_size(path)
        if size != (camera.width, camera.height):
            raise InputError(
                f"{path}: image is {size[0]}×{size[1]} but its camera says "
                f"{camera.width}×{camera.height}; give images of the calibrated size"
            )
        width, height = _fit(size, max_size)
        images.append(read_image(path, (width, height)))
        cameras.append(camera.resized(width, height))
    return images, cameras


def load_depth(
    scene: Scene, index: int, max_size: int | None = None, *, may_be_empty: bool = False
) -> np.ndarray:
    """Depth map of view `index`: [H, W] float32, planar z in scene units, 0 = unknown.

    With `max_size` it is sampled at the pixels nearest to the centres of the downsized image
    (depths of two surfaces must never be averaged). A map without any depth is refused unless it
    `may_be_empty`.
    """
    if scene.depth_paths is None:
        raise InputError(f"{scene.root}: the scene has no depth maps (depth_file_path)")
    path, camera = scene.depth_paths[index], scene.cameras[index]
    depth = load_depth_file(path, scene.depth_unit, may_be_empty=may_be_empty)
    if depth.shape != (camera.height, camera.width):
        raise InputError(
            f"{path}: depth map is {depth.shape[1]}×{depth.shape[0]} but its camera says "
            f"{camera.width}×{camera.height}"
        )
    width, height = _fit((camera.width, camera.height), max_size)
    return _nearest(depth, width, height)


def load_mask(scene: Scene, index: int, max_size: int | None = None) -> np.ndarray | None:
    """Mask of view `index`: [H, W] bool, True = use this pixel; None when the scene has none.

    Without mask files an image's own alpha is its mask: what is mostly transparent is not used.
    """
    path, camera = (scene.mask_paths or scene.image_paths)[index], scene.cameras[index]
    values = read_alpha(path) if scene.mask_paths is None else read_image(path)[..., 0]
    if values is None:
        return None
    mask = values > 127
    if mask.shape != (camera.height, camera.width):
        raise InputError(
            f"{path}: mask is {mask.shape[1]}×{mask.shape[0]} but its camera says "
            f"{camera.width}×{camera.height}"
        )
    width, height = _fit((camera.width, camera.height), max_size)
    return _nearest(mask, width, height)


def load_depth_file(
    path: str | os.PathLike[str], unit: float | None = None, *, may_be_empty: bool = False
) -> np.ndarray:
    """One depth file → [H, W] float32, planar z, 0 = unknown (NaN, infinity and ≤ 0 become 0).

    .npy; .npz (its only array, or the one called `depth`); .png with 16 bits, in steps of `unit`
    (1/1000 by default, as in nerfstudio); one-channel .pfm; .exr (channel Z, V, depth, Y or R;
    needs the OpenEXR package). Other formats hold values as they are, multiplied by `unit` when it
    is given.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such depth file")
    if unit is not None and not (np.isfinite(unit) and unit > 0):
        raise InputError(f"{path}: the depth unit must be > 0, got {unit}")
    suffix = path.suffix.lower()
    if suffix not in DEPTH_SUFFIXES:
        raise InputError(f"{path}: depth must be one of {', '.join(DEPTH_SUFFIXES)}")
    read = {
        ".npy": _read_npy, ".npz": _read_npz, ".png": _read_png16, ".exr": _read_exr,
        ".pfm": _read_pfm,
    }[suffix]  # fmt: skip
    values = np.squeeze(read(path))
    if values.ndim != 2 or not values.size or values.dtype.kind not in "fiu":
        raise InputError(
            f"{path}: expected one number per pixel [H, W], got {values.dtype} {values.shape}"
        )
    if unit is None:
        unit = 1e-3 if suffix == ".png" else 1.0
    with np.errstate(over="ignore"):
        depth = values.astype(np.float32) * np.float32(unit)
    depth[~(np.isfinite(depth) & (depth > 0))] = 0.0
    if not (may_be_empty or depth.any()):
        raise InputError(f"{path}: no pixel has a positive, finite depth")
    return depth


def list_photos(path: str | os.PathLike[str]) -> list[Path]:
    """One photo, or the photos of a folder (or of its `images` subfolder) sorted by name."""
    path = Path(path)
    if path.is_file():
        check_photo(path)
        return [path]
    if not path.is_dir():
        raise InputError(f"{path}: no such photo or folder")
    for folder in (path, path / "images"):
        if folder.is_dir():
            photos = sorted(
                p for p in folder.iterdir()
                if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file() and p.name[0] != "."
            )  # fmt: skip
            if photos:
                return photos
    held = ", ".join(sorted(entry.name for entry in path.iterdir())[:3]) or "nothing"
    raise InputError(f"{path}: holds no photo ({', '.join(IMAGE_SUFFIXES)}); it holds {held}")


def check_photo(path: Path) -> None:
    """InputError unless the file's suffix is that of a photo; says what to do with a video."""
    suffix = path.suffix.lower()
    if suffix in _VIDEO_SUFFIXES:
        raise InputError(
            f"{path}: is a video; save some frames of it (e.g. `ffmpeg -i {path.name} -r 2 "
            "frames/%04d.jpg`) and give that folder of photos"
        )
    if suffix not in IMAGE_SUFFIXES:
        raise InputError(f"{path}: not a photo (expected {', '.join(IMAGE_SUFFIXES)})")


def _fit(size: tuple[int, int], max_size: int | None) -> tuple[int, int]:
    """(width, height) scaled down so that the longer side is at most `max_size`."""
    if max_size is None or max(size) <= max_size:
        return size
    if max_size < 1:
        raise InputError(f"max_size must be at least 1 pixel, got {max_size}")
    scale = max_size / max(size)
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _nearest(values: np.ndarray, width: int, height: int) -> np.ndarray:
    """Nearest-neighbour resize with pixel centres at +0.5."""
    rows = ((np.arange(height) + 0.5) * values.shape[0] / height).astype(int)
    columns = ((np.arange(width) + 0.5) * values.shape[1] / width).astype(int)
    return values[rows[:, None], columns]


def _existing(
    files: tuple[str, ...], folders: tuple[Path, ...], source: Path, kind: str
) -> tuple[Path, ...]:
    found = []
    for file in files:
        path = next((f / file for f in folders if (f / file).is_file()), None)
        if path is None:
            raise InputError(f"{source}: {kind} {folders[0] / file} does not exist")
        found.append(path)
    return tuple(found)


def unique_names(files: Sequence[str]) -> tuple[str, ...]:
    """The stems of files, numbered when some are the same."""
    stems = [Path(file).stem for file in files]
    if len(set(stems)) == len(stems):
        return tuple(stems)
    return tuple(f"{i:05d}_{stem}" for i, stem in enumerate(stems))  # images of several folders


def _read_splits(path: Path, posed: PosedImages) -> dict[str, tuple[int, ...]] | None:
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        lists = {k: tuple(v) for k, v in content.items() if isinstance(v, list)}
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{path}: expected an object of index lists ({error})") from error
    count = len(posed.files)
    for name, indices in lists.items():
        wrong = [i for i in indices if type(i) is not int or not 0 <= i < count]
        if wrong:
            raise InputError(f"{path}: {name} holds {wrong[0]!r}, no index of the {count} frames")
    return lists


def _read_npy(path: Path) -> np.ndarray:
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path}: cannot be read as .npy ({error})") from error


def _read_npz(path: Path) -> np.ndarray:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            names = arrays.files
            name = names[0] if len(names) == 1 else next((n for n in names if n == "depth"), None)
            if name is None:
                name = next((n for n in names if n.startswith("depth")), None)
            if name is None:
                raise InputError(f"{path}: expected an array called depth, got {', '.join(names)}")
            return arrays[name]
    except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: cannot be read as .npz ({error})") from error


def _read_png16(path: Path) -> np.ndarray:
    try:
        with Image.open(path) as image:
            if image.mode not in ("I;16", "I", "I;16B"):
                raise InputError(
                    f"{path}: a depth PNG must have one channel of 16 bits, this one is mode "
                    f"{image.mode}; 8 bits are a picture, not depth"
                )
            return np.asarray(image)
    except (OSError, SyntaxError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: cannot be read as a PNG ({error})") from error


def _read_exr(path: Path) -> np.ndarray:
    try:
        import OpenEXR
    except ImportError:
        raise InputError(
            f"{path}: EXR needs another package; pip install OpenEXR, or give the depth as .npy"
        ) from None
    try:
        with OpenEXR.File(str(path), separate_channels=True) as opened:
            channels = {name: np.array(entry.pixels) for name, entry in opened.channels().items()}
    except Exception as error:  # the library raises bare exceptions for whatever it cannot parse
        raise InputError(f"{path}: cannot be read as EXR ({error})") from error
    # Renderers call depth Z, or V in a file of its own; others store it as grey or as RGB.
    for wanted in ("Z", "V", "depth", "Y", "R"):
        for name, values in channels.items():
            if name.split(".")[-1] == wanted:
                return values
    raise InputError(f"{path}: no channel Z, V, depth, Y or R; it has {', '.join(channels)}")


def _read_pfm(path: Path) -> np.ndarray:
    """Portable float map: rows are stored bottom up, a negative scale means little-endian."""
    try:
        kind, size, scale, data = path.read_bytes().split(b"\n", 3)
        width, height = (int(word) for word in size.split())
        values = np.frombuffer(data, "<f4" if float(scale) < 0 else ">f4")
        if kind.strip() != b"Pf" or min(width, height) < 1:
            raise ValueError("the header must be Pf, width height, scale")
        return values.reshape(height, width)[::-1].astype(np.float32)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as a one-channel PFM ({error})") from error
