"""New views of a photo (or a few posed ones) along a camera path, paper Sec. 3.3.

    reference images + depth ─ z-buffer warp ─► Î, M for every camera of the path
    Î, M, references ─ codec ─► latents ─ DDIM over groups of views ─► codec ─► views

In one round, or in several that build on the views of those before (`pipelines.rounds`). A group
holds as many views as the model was trained with: the clean ones (references, anchors) and the next
targets; so its memory does not grow with the length of the path. The aspect ratio of the input is
kept: the working size has the area the model was trained at. Images are uint8 RGB [h, w, 3] here,
masks bool with True = known, depth planar z; cameras as in geometry.cameras.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from see3d_jax.errors import InputError
from see3d_jax.geometry.cameras import Camera, intrinsics_matrix, stack
from see3d_jax.geometry.scene_files import read_transforms
from see3d_jax.geometry.trajectories import (
    MOVES,
    focus_distance,
    from_file,
    interpolate,
    make_trajectory,
)
from see3d_jax.media import image_size, read_image
from see3d_jax.pipelines.baselines import inpaint, nearest_reference, score
from see3d_jax.pipelines.depth import (
    model_estimate,
    reference_depths,
    stereo_estimate,
    stereo_references,
)
from see3d_jax.pipelines.depth_model import DepthModel, load_depth_model
from see3d_jax.pipelines.group_sampling import sample_groups
from see3d_jax.pipelines.inputs import Scene, check_photo, load_images, load_scene
from see3d_jax.pipelines.path_checks import path_warnings
from see3d_jax.pipelines.pretrained import checkpoint_folder, load_model
from see3d_jax.pipelines.rounds import DepthEstimator, run_rounds
from see3d_jax.pipelines.sfm import open_scene
from see3d_jax.pipelines.superres import FACTOR, enlarge_views, load_superres
from see3d_jax.pipelines.warps import SUPERSAMPLE, View, middle_of

DEFAULT_FOV = 55.0  # degrees, horizontal: between a phone's main camera (65) and its zoom (45)
DEFAULT_VIEWS = 8
INTERPOLATE = "interpolate"  # the trajectory through the references
_GROUPS_PER_ROUND = 1 << 16  # more than there are: every group has noise of its own


@dataclasses.dataclass(frozen=True)
class Generated:
    """What `generate` returns; N views, R references, all of one size h × w.

    The views have the shape of the first reference; of a reference of another shape, the middle
    part that has that shape is given here and to the model. All of it is warped.

    Attributes:
      views: [N, h, w, 3] uint8, the result: `composited` if asked for, else `generated`.
      generated: [N, h, w, 3] uint8, as the model made them.
      composited: [N, h, w, 3] uint8, the same with the known pixels of the warp put back.
      cameras: batch [N].
      warps: [N, h, w, 3] uint8, black where unknown; masks: [N, h, w] bool, True = known.
      depths: [N, h, w] float32, planar z of the warp, 0 = unknown.
      inpainted: [N, h, w, 3] uint8, the warp filled by OpenCV (Telea).
      references, reference_cameras, reference_depths, reference_names: the R given views.
      enlarged: [N, 2h, 2w, 3] uint8, `views` after super-resolution, or None.
      truth: [N, h, w, 3] uint8 or None.
      metrics: PSNR and SSIM against the truth (see `baselines.score`), or None.
      run: every setting, the seed and the seconds spent, as plain JSON values.
    """

    views: np.ndarray
    generated: np.ndarray
    composited: np.ndarray
    cameras: Camera
    warps: np.ndarray
    masks: np.ndarray
    depths: np.ndarray
    inpainted: np.ndarray
    references: np.ndarray
    reference_cameras: Camera
    reference_depths: np.ndarray
    reference_names: tuple[str, ...]
    enlarged: np.ndarray | None
    truth: np.ndarray | None
    metrics: dict[str, Any] | None
    run: dict[str, Any]


def generate(
    source: str | os.PathLike[str],
    *,
    trajectory: str,
    checkpoint: str | os.PathLike[str] | None = None,
    depth: str | os.PathLike[str] | None = None,
    depth_kind: str | None = None,
    views: int | None = None,
    references: Sequence[int | str] = (),
    fov: float | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    sampler: str = "ddim",
    unet: str | None = None,
    prompt: str | None = None,
    size: int | None = None,
    composite: bool | None = None,
    truth: str | os.PathLike[str] | None = None,
    views_per_round: int | None = None,
    depth_estimator: DepthEstimator | None = None,
    rounds_folder: str | os.PathLike[str] | None = None,
    sr: str | os.PathLike[str] | None = None,
    cameras_folder: str | os.PathLike[str] | None = None,
    matcher: str | os.PathLike[str] | None = None,
    seed: int = 0,
) -> Generated:
    """Generates views along a camera path from one photo with depth, or from posed views.

    Args:
      source: a photo, or a scene folder (see `pipelines.sfm.open_scene`). A photo that is a
        frame of the `trajectory` file takes its camera from there; otherwise its camera is the
        origin of the world, with the horizontal field of view `fov`.
      trajectory: a move around the first reference (`geometry.trajectories.MOVES`); "interpolate",
        a smooth path through two or more references; or a file of cameras: transforms.json, CSV,
        COLMAP folder.
      checkpoint: workdir of a training run, folder of converted released weights, or packed model;
        default the small one inside the package.
      depth: planar depth of the first reference, of its size; or a depth model, an .onnx file
        whose output is of `depth_kind` (see `pipelines.depth_model`). Where the source has none
        either, it is estimated by stereo between two or more references.
      views: how many; default 8, or every camera of the file but those of the references. More
        than the file has: the file's cameras are keyframes of a smooth path.
      references: indices or names of the source's frames to start from; default the first, and
        its neighbours where depth has to come from stereo.
      steps, guidance: of the sampler; default: what the model was evaluated with.
      sampler, unet, prompt: see `pretrained.load_model`.
      size: side of the square whose area the views have; default that of the training images.
      composite: make `composited` the result; default: if the model's codec loses details.
      truth: a scene folder that holds the true image of every camera of the path; default: the
        source, if the path is its own.
      views_per_round: how many views are made before they serve as anchors of the next; default
        all, each from the references alone.
      depth_estimator: of new views between rounds; default stereo with what exists.
      rounds_folder: where finished rounds are kept, so that a run that was killed goes on there.
      sr: weights for a last pass that enlarges the result by two (`pipelines.superres`).
      cameras_folder: where the cameras of a folder of unposed photos are kept (`pipelines.sfm`);
        default: such folders are refused.
      matcher: an .onnx file that matches such photos instead of SIFT (`pipelines.matching`).
      seed: same seed, same views.

    Raises InputError for anything wrong with these, naming it.
    """
    _check_numbers(views=views, views_per_round=views_per_round, size=size, fov=fov)
    clock = _Clock()
    depth_model = None
    if depth is not None and Path(depth).suffix.lower() == ".onnx":
        depth_model = load_depth_model(depth, depth_kind)
    elif depth_kind is not None:
        raise InputError("--depth-kind says what a depth model outputs; give --depth MODEL.onnx")
    depth_file = None if depth_model else depth
    scene = open_source(
        Path(source),
        depth_file,
        trajectory,
        fov,
        cameras_folder,
        matcher,
        depth_model is not None,
    )
    if references or depth is not None:
        chosen = choose_frames(scene, references or (0,))
    else:
        chosen = stereo_references(scene)
    if depth_file is not None and len(chosen) > 1:
        raise InputError("--depth is the depth of one reference; give only one --reference with it")
    model = load_model(
        checkpoint, unet=unet, references=len(chosen), sampler=sampler, prompt=prompt
    ).sampled_with(steps, guidance)
    steps, guidance = model.sampling.num_steps, model.sampling.guidance
    enlarger = None if sr is None else load_superres(sr, sampler)
    composite = model.composite if composite is None else composite
    first = scene.cameras[chosen[0]]
    width, height = working_size(
        first.width, first.height, size or model.image_size, model.size_multiple
    )
    largest = max(width, height) * SUPERSAMPLE
    images, cameras = load_images(scene, tuple(chosen), largest)
    depths, depth_from = reference_depths(scene, chosen, images, cameras, largest, depth_model)
    given_files = [scene.image_paths[i] for i in chosen]
    path = _camera_path(trajectory, cameras, depths[0], given_files, views)
    path = [path[i].resized(width, height) for i in range(len(path.intrinsics))]
    file = _transforms_file(trajectory)
    own = file is not None and file.parent.resolve() == scene.root.resolve()
    true_images = _true_images(truth, file if own else None, path)
    clock.lap("load")

    targets = stack(path)
    known_views = [View(*parts) for parts in zip(images, depths, cameras, strict=True)]
    shape = first.width, first.height
    middles = [middle_of(view, shape, width, height) for view in known_views]
    given = np.stack([view.image for view in middles])
    settings = {
        "checkpoint": str(checkpoint_folder(checkpoint).resolve()), "model": model.name,
        "sampler": sampler, "steps": steps, "guidance": guidance, "seed": seed, "prompt": prompt,
    }  # fmt: skip

    def fill(
        number: int, anchors: list[View], _: list[int], warps: np.ndarray, masks: np.ndarray
    ) -> np.ndarray:
        # At least half of what the references leave of a group is for targets.
        pinned = [view.image for view in anchors[: (model.views - len(given)) // 2]]
        clean = np.concatenate([given, np.stack(pinned)]) if pinned else given
        first = number * _GROUPS_PER_ROUND
        return sample_groups(model, clean, warps, masks, seed, first)

    rounds = run_rounds(
        known_views, targets,
        views_per_round or len(path), fill,
        depth_estimator or _default_estimator(depth_model),
        folder=rounds_folder and Path(rounds_folder), settings=settings,
    )  # fmt: skip
    warps, masks, warp_depths, generated = (
        np.concatenate([getattr(done, name) for done in rounds])
        for name in ("warps", "masks", "depths", "generated")
    )
    clock.lap("rounds")

    inpainted = np.stack([inpaint(w, m) for w, m in zip(warps, masks, strict=True)])
    composited = np.where(masks[..., None], warps, generated)
    result = composited if composite else generated
    enlarged = None
    if enlarger is not None:
        large_model, wants_masks = enlarger
        large = np.stack(
            [middle_of(v, shape, width * FACTOR, height * FACTOR).image for v in known_views]
        )
        enlarged = enlarge_views(
            large_model.sampled_with(steps, None), large, result,
            masks if wants_masks else None, seed,
        )  # fmt: skip
        clock.lap("super-resolution")
    small = stack([view.camera for view in middles])
    metrics = None
    if true_images is not None:
        nearest = given[nearest_reference(targets, small)]
        candidates = {
            "raw_warp": warps, "inpainted_warp": inpainted, "generated": generated,
            "generated_composited": composited, "nearest_reference": nearest,
        }  # fmt: skip
        metrics = score(true_images, masks, candidates)
        clock.lap("score")
    names = tuple(scene.names[i] for i in chosen)
    return Generated(
        views=result, generated=generated, composited=composited, cameras=targets,
        warps=warps, masks=masks, depths=warp_depths, inpainted=inpainted,
        references=given, reference_cameras=small,
        reference_depths=np.stack([view.depth for view in middles]),
        reference_names=names,
        enlarged=enlarged, truth=true_images, metrics=metrics,
        run={
            "input": str(source), "depth": depth and str(depth), "depth_from": depth_from,
            "trajectory": trajectory, "checkpoint": checkpoint and str(checkpoint),
            "model": model.name, "sampler": sampler, "prompt": prompt,
            "truth": truth and str(truth), "sr": sr and str(sr),
            "references": list(names), "fov": fov, "steps": steps,
            "guidance": guidance, "composite": composite, "seed": seed,
            "width": width, "height": height, "num_views": len(path),
            "known_share": round(float(masks.mean()), 4), "views_per_round": views_per_round,
            "warnings": path_warnings(known_views, list(names), targets, masks),
            "rounds": [done.report for done in rounds], "seconds": clock.laps,
            "jax_backend": jax.default_backend(),
        },
    )  # fmt: skip


# --- what is given ------------------------------------------------------------------------------


def _check_numbers(**values: float | None) -> None:
    for name in ("views", "views_per_round"):
        if values[name] is not None and values[name] < 1:
            option = name.replace("_", "-")
            raise InputError(f"--{option} must be at least 1, got {values[name]}")
    if values["size"] is not None and not 16 <= values["size"] <= 4096:
        raise InputError(f"--size must be 16 to 4096 pixels, got {values['size']}")
    if values["fov"] is not None and not 1 <= values["fov"] <= 170:
        raise InputError(f"--fov must be 1 to 170 degrees, got {values['fov']}")


def _default_estimator(model: DepthModel | None) -> DepthEstimator:
    if model is None:
        return DepthEstimator(stereo_estimate, has_scale=True)
    return DepthEstimator(functools.partial(model_estimate, model), has_scale=False)


def open_source(
    source: Path, depth: str | os.PathLike[str] | None, trajectory: str, fov: float | None,
    cameras_folder: str | os.PathLike[str] | None, matcher: str | os.PathLike[str] | None,
    has_depth_model: bool,
) -> Scene:  # fmt: skip
    """The given photo or folder as a Scene; one photo is a scene of one view."""
    if not source.exists():
        raise InputError(f"{source}: no such photo or folder")
    if source.is_dir() or source.suffix == ".json":
        scene = open_scene(source, cameras_folder, matcher)
    else:
        scene = _scene_of_photo(source, trajectory, fov)
    if depth is not None:
        depth = Path(depth)
        # Integer steps mean what the scene's file says they mean; other formats hold plain numbers.
        unit = scene.depth_unit if depth.suffix.lower() == ".png" else 1.0
        scene = dataclasses.replace(
            scene, depth_paths=(depth,) * len(scene), depth_unit=unit
        )  # only that of the one reference will be read
    if scene.depth_paths is None and len(scene) == 1 and not has_depth_model:
        raise InputError(
            f"{source}: one photo needs its depth; give --depth with a depth map or an .onnx model"
        )
    return scene


def _scene_of_photo(photo: Path, trajectory: str, fov: float | None) -> Scene:
    """A scene of one view, with the camera (and depth) it has in the trajectory file, if any."""
    check_photo(photo)
    width, height = image_size(photo)
    file = _transforms_file(trajectory)
    if file is not None:
        posed = read_transforms(file)
        for i, name in enumerate(posed.files):
            if (file.parent / name).resolve() == photo.resolve():
                depths = posed.depth_files and (file.parent / posed.depth_files[i],)
                return Scene(
                    file.parent, (photo.stem,), (photo,), (posed.cameras[i],), depths,
                    posed.depth_unit,
                )  # fmt: skip
    focal = 0.5 * width / math.tan(math.radians(fov or DEFAULT_FOV) / 2)
    intrinsics = intrinsics_matrix(focal, focal, width / 2, height / 2)
    camera = Camera(intrinsics, np.eye(4, dtype=np.float32), width, height)
    return Scene(photo, (photo.stem,), (photo,), (camera,))


def choose_frames(scene: Scene, wanted: Sequence[int | str]) -> list[int]:
    """Indices of the frames called so, by index or name, each once. Raises InputError."""
    chosen = []
    for text in map(str, wanted):
        if text in scene.names:
            chosen.append(scene.names.index(text))
        elif text.isdecimal() and int(text) < len(scene):
            chosen.append(int(text))
        else:
            raise InputError(
                f"--reference {text}: {scene.root} has frames 0 to {len(scene) - 1} "
                f"({scene.names[0]} … {scene.names[-1]})"
            )
    return list(dict.fromkeys(chosen))


def working_size(width: int, height: int, side: int, multiple: int) -> tuple[int, int]:
    """(width, height) of the given aspect ratio and an area near side², in multiples."""
    scale = side / math.sqrt(width * height)
    snap = (max(1, round(length * scale / multiple)) * multiple for length in (width, height))
    return tuple(snap)


# --- where to look ------------------------------------------------------------------------------


def _camera_path(
    trajectory: str, references: list[Camera], depth: np.ndarray, given: list[Path],
    views: int | None,
) -> Camera:  # fmt: skip
    """The cameras to generate: a move around the first reference, through all, or of a file."""
    first = references[0]
    if trajectory in MOVES:
        return make_trajectory(trajectory, first, focus_distance(depth), views or DEFAULT_VIEWS)
    if trajectory == INTERPOLATE:
        if len(references) < 2:
            raise InputError("--trajectory interpolate: needs two or more --reference frames")
        return interpolate(stack([_reshaped(c, first) for c in references]), views or DEFAULT_VIEWS)
    file = _transforms_file(trajectory)
    if file is not None:
        path = _cameras_of_file(file, given, (first.width, first.height))
    elif Path(trajectory).exists():
        path = from_file(trajectory, first)
    else:
        raise InputError(
            f"--trajectory {trajectory}: neither one of {', '.join((*MOVES, INTERPOLATE))} nor an "
            "existing file"
        )
    count = len(path.intrinsics)
    if views is not None and views > count > 1:
        return interpolate(path, views)
    if views is not None and views < count:
        path = path[np.linspace(0, count - 1, views).round().astype(int)]
    return path


def _reshaped(camera: Camera, like: Camera) -> Camera:
    """The camera with the picture of another; its field of view is kept along the diagonal."""
    scale = math.hypot(like.width, like.height) / math.hypot(camera.width, camera.height)
    width, height = round(camera.width * scale), round(camera.height * scale)
    left, top = (width - like.width) / 2, (height - like.height) / 2
    return camera.resized(width, height).window(left, top, like.width, like.height)


def _transforms_file(trajectory: str) -> Path | None:
    """The transforms.json meant by --trajectory, if it means one (a folder may stand for it)."""
    file = Path(trajectory)
    if trajectory not in MOVES and file.is_dir():
        file = file / "transforms.json"
    return file if file.suffix.lower() == ".json" and file.is_file() else None


def _cameras_of_file(file: Path, given: list[Path], size: tuple[int, int]) -> Camera:
    """Cameras of a file at `size` (width, height), without those of the given images."""
    posed = read_transforms(file)
    taken = {path.resolve() for path in given}
    cameras = [
        camera
        for name, camera in zip(posed.files, posed.cameras, strict=True)
        if (file.parent / name).resolve() not in taken
    ]
    if not cameras:
        raise InputError(f"{file}: has no camera other than those of the references")
    for camera in cameras:
        if abs(math.log(camera.width / camera.height * size[1] / size[0])) > 0.02:
            raise InputError(
                f"{file}: its cameras are {camera.width}×{camera.height}, the reference is "
                f"{size[0]}×{size[1]}; both need the same aspect ratio"
            )
    return stack([camera.resized(*size) for camera in cameras])


def _true_images(
    truth: str | os.PathLike[str] | None, own_file: Path | None, path: list[Camera]
) -> np.ndarray | None:
    """The true image of every camera, found by its pose: [N, h, w, 3] uint8, None when unknown.

    `own_file` is the path's file when it is the source's own: then its images, if there are any.
    """
    if truth is None and own_file is None:
        return None
    try:
        scene = load_scene(truth if truth is not None else own_file)
    except InputError:
        if truth is None:  # a file of cameras without images
            return None
        raise
    poses = np.stack([camera.world_to_camera for camera in scene.cameras])
    tolerance = 1e-3 * max(1.0, float(np.abs(poses[:, :3, 3]).max()))
    found = []
    for i, camera in enumerate(path):
        distance = np.abs(poses - np.asarray(camera.world_to_camera)).max((1, 2))
        if distance.min() > tolerance:
            raise InputError(f"{truth}: has no image with the pose of camera {i} of the path")
        file = scene.image_paths[int(distance.argmin())]
        found.append(read_image(file, (camera.width, camera.height)))
    return np.stack(found)


class _Clock:
    """Seconds spent per stage."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.laps[name] = round(now - self._last, 2)
        self._last = now
