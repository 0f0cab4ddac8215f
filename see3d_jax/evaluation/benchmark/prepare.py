"""One scene and one split as files that `generate` reads: what is given apart from what is scored.

    given/transforms.json     the given views, with depth where it is known before
    targets/transforms.json   the cameras to predict; their images are the truth

Photos stay where they are (their full paths are named). Where the depth of the given views comes
from is part of the protocol, so it is chosen here and named in every result.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from see3d_jax.errors import InputError
from see3d_jax.evaluation.benchmark.datasets import Split
from see3d_jax.files import write_json
from see3d_jax.geometry.cameras import Camera, stack
from see3d_jax.geometry.multiview import choose_sources
from see3d_jax.geometry.scene_files import PosedImages, write_transforms
from see3d_jax.media import read_image, write_image
from see3d_jax.pipelines.depth import stereo
from see3d_jax.pipelines.inputs import Scene, load_depth, load_images
from see3d_jax.pipelines.warps import resize_depth

AUTO, SCENE, STEREO, NEIGHBOURS = DEPTH_SOURCES = ("auto", "scene", "stereo", "neighbours")
_HELPERS = 2  # unseen frames that stereo of "neighbours" looks at, besides the given ones
_ENOUGH = 0.02  # share of a view that must have depth to be of use


@dataclasses.dataclass(frozen=True)
class Task:
    """A prepared split.

    Attributes:
      given, targets: folders with transforms.json; the given views come first to last as split.
      depth_from: "scene", "stereo", "neighbours" (or "model", by the caller's choice).
      object_masks: files that mark the object in each target, or None.
      names: of the targets.
    """

    given: Path
    targets: Path
    depth_from: str
    object_masks: tuple[Path, ...] | None
    names: tuple[str, ...]


def prepare(scene: Scene, split: Split, folder: Path, depth: str, has_model: bool) -> Task:
    """Writes the two folders described above into `folder`.

    Args:
      scene: all frames.
      split: which of them are given and predicted.
      folder: is created.
      depth: of the given views. "scene": the benchmark's depth maps. "stereo": between the given
        views, by `generate` itself. "neighbours": stereo with the two nearest frames that are not
        predicted, whose photos nothing else sees: more than a user of so few photos has. "auto":
        the first of scene, stereo (three given views or more) and neighbours that there can be.
      has_model: a depth network is used instead; `depth` has no effect.

    Raises InputError when there is no such depth.
    """
    kind = "model" if has_model else _depth_kind(scene, split, depth)
    files = _write_depths(scene, split, folder / "given", kind)
    _write(scene, split.given, folder / "given", files)
    _write(scene, split.test, folder / "targets", None)
    masks = scene.mask_paths and tuple(scene.mask_paths[i].resolve() for i in split.test)
    names = tuple(scene.names[i] for i in split.test)
    return Task(folder / "given", folder / "targets", kind, masks, names)


def write_pictures(
    folder: Path,
    train: dict[str, tuple[np.ndarray, Camera]],
    test: dict[str, tuple[np.ndarray, Camera]],
) -> Path:
    """A scene folder for `reconstruct`: pictures by name, those of `test` held out."""
    views = {
        f"{kind}/{name}.png": view
        for kind, group in (("train", train), ("test", test))
        for name, view in group.items()
    }
    for file, (picture, _) in views.items():
        write_image(folder / file, picture)
    cameras = tuple(camera for _, camera in views.values())
    write_transforms(folder / "transforms.json", PosedImages(tuple(views), cameras))
    order = list(range(len(views)))
    lists = {"train_all": order[: len(train)], "test": order[len(train) :]}
    write_json(folder / "splits.json", lists)
    return folder


def read_masks(task: Task, width: int, height: int) -> np.ndarray | None:
    """[N, height, width] bool, True = the object; None where the benchmark has no masks."""
    if task.object_masks is None:
        return None
    return np.stack([read_image(path, (width, height))[..., 0] > 127 for path in task.object_masks])


def _depth_kind(scene: Scene, split: Split, wanted: str) -> str:
    if wanted == AUTO:
        if scene.depth_paths is not None:
            return SCENE
        return STEREO if len(split.given) > 2 else NEIGHBOURS
    if wanted == SCENE and scene.depth_paths is None:
        raise InputError(f"{scene.root}: has no depth maps; choose --depth auto or neighbours")
    if wanted == STEREO and len(split.given) < 2:
        raise InputError(
            f"{scene.root}: stereo needs two given views; choose --depth neighbours or a network"
        )
    return wanted


def _write_depths(scene: Scene, split: Split, folder: Path, kind: str) -> tuple[str, ...] | None:
    if kind not in (SCENE, NEIGHBOURS):
        return None
    files = []
    for number, index in enumerate(split.given):
        found = load_depth(scene, index) if kind == SCENE else _neighbour_depth(scene, split, index)
        files.append(f"depth/{number:03d}.npy")
        (folder / "depth").mkdir(parents=True, exist_ok=True)
        np.save(folder / files[-1], found)
    return tuple(files)


def _neighbour_depth(scene: Scene, split: Split, index: int) -> np.ndarray:
    """Depth of a given view by stereo with frames that are not predicted: [H, W] float32."""
    camera = scene.cameras[index]
    size = camera.width, camera.height
    others = [
        i for i, other in enumerate(scene.cameras)
        if i != index and i not in split.test and (other.width, other.height) == size
    ]  # fmt: skip
    if not others:
        raise InputError(f"{scene.image_paths[index]}: no other frame of its size for stereo")
    pool = [index, *others]
    order = choose_sources(stack([scene.cameras[i] for i in pool]))[0][:_HELPERS]
    images, cameras = load_images(scene, (index, *(pool[i] for i in order)), 640)
    depth = stereo(images, cameras)[0]
    if (depth > 0).mean() < _ENOUGH:
        raise InputError(f"{scene.image_paths[index]}: stereo with its neighbours found no depth")
    return resize_depth(depth, *size)


def _write(scene: Scene, frames: tuple[int, ...], folder: Path, depths: tuple | None) -> None:
    images = PosedImages(
        files=tuple(str(scene.image_paths[i].resolve()) for i in frames),
        cameras=tuple(scene.cameras[i] for i in frames),
        depth_files=depths,
        depth_unit=1.0,
    )
    write_transforms(folder / "transforms.json", images)
