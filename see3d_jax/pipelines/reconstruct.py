"""Posed photos → a scene of 3D Gaussians, with an honest score on views it has never seen.

Every 8th view (or the folder's splits.json) is held out; the rest is fitted. Written, all at once
or not at all:
  point_cloud.ply   the scene; opens in any 3DGS viewer
  cameras.json      the views' cameras as INRIA's code writes them, as they are after the fit
  orbit.mp4         a flight along the smoothed path of the cameras
  renders.png       held-out photos above what the scene shows from there
  renders/NAME.png  each of these renders by itself, to measure with
  metrics.json      psnr, ssim (means over the held-out views), every view, and how it was made
The background is black, as in every viewer: what no Gaussian covers stays black.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from see3d_jax.errors import InputError
from see3d_jax.evaluation.lpips import load_lpips
from see3d_jax.evaluation.metrics import psnr, ssim
from see3d_jax.files import atomic_path, write_json
from see3d_jax.geometry.cameras import Camera, stack
from see3d_jax.media import contact_sheet, read_image, to_uint8, write_image, write_mp4
from see3d_jax.pipelines.depth import point_depths
from see3d_jax.pipelines.flight import camera_path
from see3d_jax.pipelines.inputs import Scene, load_depth, load_images, load_mask
from see3d_jax.pipelines.refine_cameras import RefinedCameras, refine_cameras
from see3d_jax.pipelines.scene_export import CAMERAS_FILE, write_cameras
from see3d_jax.pipelines.sfm import beside, open_scene
from see3d_jax.splatting import seeds
from see3d_jax.splatting.exposure import exposed, spread
from see3d_jax.splatting.fit import FitConfig, FitResult, TrainingViews, fit
from see3d_jax.splatting.fit_step import fewness
from see3d_jax.splatting.formats import write_ply
from see3d_jax.splatting.gaussians import Gaussians, from_points, occupied
from see3d_jax.splatting.poses import carried_along
from see3d_jax.splatting.render import enough_capacity, render

COMMAND = "see3d reconstruct"  # in metrics.json: how a folder is known to be ours
MIN_IMAGE_SIZE = 32  # pixels; SSIM needs 11, and less than this is no photo
SHEET_COLUMNS = 6
MATCHED_SIZE = 1000  # pixels, longest side of the photos that cameras are refined by


@dataclasses.dataclass(frozen=True)
class _View:
    """One image with what is needed to fit or score it; weight 1 = the pixel counts."""

    name: str
    image: np.ndarray  # [H, W, 3] uint8
    camera: Camera
    weight: np.ndarray | None  # [H, W] bool
    trust: np.ndarray | None = None  # [H, W] float32 in [0, 1], how much the fit believes a pixel
    depth: np.ndarray | None = None  # [H, W] float32 planar z, 0 = unknown
    points: np.ndarray | None = None  # [K, 3] float32, sparse points it saw: pixel x, y; planar z


def reconstruct(
    input_dir: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    *,
    steps: int = 2000,
    num_gaussians: int = 15_000,
    max_size: int = 320,
    sh_degree: int = 1,
    seed: int = 0,
    orbit_frames: int = 90,
    refine_poses: bool = False,
    generated_weight: float = 0.3,
    config: FitConfig | None = None,
    progress: bool = True,
    mesh: Mesh | None = None,
) -> dict[str, Any]:
    """Fits a Gaussian scene to a folder of posed views and writes the files described above.

    Args:
      input_dir: scene folder, or unposed photos: their cameras are then found and kept in
        OUTPUT_cameras (see `pipelines.sfm`).
      output_dir: result folder; an earlier result of this command is replaced.
      steps: optimisation steps, one view each.
      num_gaussians: how many Gaussians the scene may grow to.
      max_size: longest image side in pixels; larger images are downsized.
      sh_degree: 0–3, how much colour may change with the viewing direction.
      seed: same seed, same point_cloud.ply, byte for byte (on as many devices).
      orbit_frames: frames of orbit.mp4 one way; it plays forth and back.
      refine_poses: correct the cameras first, by what the photos have in common
        (`refine_cameras`; held-out photos find only their own camera).
      generated_weight: how much a pixel that a model made up counts beside one that a photo shows;
        used on the folders of `see3d generate`, whose masks tell them apart.
      config: terms of the loss and rates of the optimiser; its `steps` are overridden. With its
        `refine_poses` the training cameras move during the fit as well, and the held-out cameras
        follow the world as it drifts.
      progress: show a progress bar, where stderr is a terminal.
      mesh: from `splatting.processor.host_mesh`: fit on all of its devices.

    A fit that is killed leaves OUTPUT_partial.npz; the same call goes on there, and ends with the
    same bytes. Returns the content of metrics.json. Raises InputError for unusable input, before
    any work.
    """
    started = time.perf_counter()
    _check_options(steps, num_gaussians, max_size, sh_degree, seed, orbit_frames)
    config = dataclasses.replace(config or FitConfig(), steps=steps)
    _check_config(config, generated_weight)
    output = Path(output_dir)
    _check_output_folder(output)
    scene = open_scene(input_dir, beside(output))
    train_indices, test_indices = _split(scene)
    train = _load_views(scene, train_indices, max_size)
    train = _trusted(scene, train_indices, train, generated_weight)
    if config.depth_weight:
        train = _with_depth(scene, train_indices, train, max_size)
    test = _load_views(scene, test_indices, max_size)
    refined = None
    if refine_poses:
        refined = _refined(scene, train_indices, test_indices, generated_weight)
        train = _with_poses(train, refined.poses[: len(train)])
        test = _with_poses(test, refined.poses[len(train) :])

    # The scene's points were found with the cameras as they were given.
    moving = config.refine_poses or (refined is not None and refined.moved)
    if config.points_weight * fewness(len(train)) and not moving:
        train = _with_points(scene, train_indices, train)

    generator = np.random.default_rng(seed)
    points, source = _starting_points(
        scene, train_indices, train, num_gaussians, max_size, generator
    )
    nearest, farthest = seeds.depth_range([view.camera for view in train], points[0])
    near = 0.1 * nearest
    canvas = _canvas([*train, *test])
    state_file = output.with_name(output.name + "_partial.npz")
    result = fit(
        _on_canvas(train, canvas),
        from_points(*points, num_gaussians, sh_degree),
        scene_size=float(np.sqrt(nearest * farthest)),
        config=config,
        seed=seed,
        near=near,
        content_from=nearest,
        progress=progress,
        mesh=mesh,
        state_file=state_file,
    )
    if config.refine_poses:
        before = np.stack([np.asarray(view.camera.world_to_camera) for view in train])
        after = np.asarray(result.cameras.world_to_camera)
        held_out = np.stack([np.asarray(view.camera.world_to_camera) for view in test])
        held_out = carried_along(held_out, before, after).astype(np.float32)
        train, test = _with_poses(train, after), _with_poses(test, held_out)
    scene_of_gaussians = result.gaussians
    # Room that all views have in one compiled program; `render` makes more where a flight needs it.
    room = enough_capacity(result.pair_capacity * (1 if mesh is None else mesh.size))
    draw = partial(_render_view, scene_of_gaussians, canvas=canvas, near=near, capacity=room)
    test_renders = [draw(view.camera) for view in test]
    train_renders = [draw(view.camera) for view in train]
    brightness = None
    if result.exposures is not None:  # held-out views have none
        brightness = round(float(spread(result.exposures)), 4)
        train_renders = [
            np.clip(exposed(image, own), 0.0, 1.0)
            for image, own in zip(train_renders, result.exposures, strict=True)
        ]
    metrics = {
        "command": COMMAND,
        "input": os.path.relpath(scene.root, output),  # from here, where the photos are
        **_scores(test, test_renders, "psnr", "ssim"),
        **_scores(train, train_renders, "train_psnr", "train_ssim"),
        "num_gaussians": int(occupied(scene_of_gaussians).count),
        "steps": steps,
        "seed": seed,
        "sh_degree": sh_degree,
        "refined_poses": refine_poses or config.refine_poses,
        "bundle": refined and refined.report(),
        "densify": config.densify,
        "weights": {
            "generated": generated_weight if any(v.trust is not None for v in train) else None,
            "lpips": config.lpips_weight,
            "points": None if train[0].points is None else config.points_weight,
            "depth": config.depth_weight,
            "smooth": config.smooth_weight,
        },
        "exposure": brightness,  # how much photos differ in it; 0 = taken as equal
        "image_size": [int(train[0].camera.width), int(train[0].camera.height)],
        "num_train_views": len(train),
        "num_test_views": len(test),
        "starting_points": source,
        "milliseconds_per_step": round(result.step_seconds * 1e3, 2),
        "fit_seconds": round(result.seconds, 2),
        "per_view": _per_view(test, test_renders),
    }
    flight = camera_path([view.camera for view in train], orbit_frames)
    frames = [to_uint8(draw(camera)) for camera in flight]
    metrics["seconds"] = round(time.perf_counter() - started, 2)
    _write(output, result, metrics, train, test, test_renders, frames)
    state_file.unlink(missing_ok=True)
    return metrics


def _check_options(
    steps: int, num_gaussians: int, max_size: int, sh_degree: int, seed: int, orbit_frames: int
) -> None:
    minimum = {
        "steps": (steps, 1),
        "num_gaussians": (num_gaussians, 1),
        "max_size": (max_size, MIN_IMAGE_SIZE),
        "seed": (seed, 0),
        "orbit_frames": (orbit_frames, 1),
    }
    for name, (value, least) in minimum.items():
        if value < least:
            raise InputError(f"{name} must be at least {least}, got {value}")
    if sh_degree not in (0, 1, 2, 3):
        raise InputError(f"sh_degree must be 0, 1, 2 or 3, got {sh_degree}")


def _check_config(config: FitConfig, generated_weight: float) -> None:
    weights = {
        "generated_weight": generated_weight,
        "lpips_weight": config.lpips_weight,
        "points_weight": config.points_weight,
        "depth_weight": config.depth_weight,
        "smooth_weight": config.smooth_weight,
    }
    for name, value in weights.items():
        if not (np.isfinite(value) and value >= 0):
            raise InputError(f"{name} must be a number ≥ 0, got {value}")
    if generated_weight > 1:
        raise InputError(f"generated_weight must be at most 1, got {generated_weight}")
    if config.densify not in ("mcmc", "classic"):
        raise InputError(f"densify must be mcmc or classic, got {config.densify!r}")
    if config.lpips_weight:
        load_lpips("vgg")  # says what to install, before any work


def _check_output_folder(output: Path) -> None:
    """Refuses, before any work, to replace something this command did not write."""
    if output.exists() and not output.is_dir():
        raise InputError(f"{output}: is a file; the output must be a folder")
    if output.is_dir() and any(output.iterdir()):
        try:
            content = json.loads((output / "metrics.json").read_text(encoding="utf-8"))
            ours = content.get("command") == COMMAND
        except (OSError, ValueError, AttributeError):
            ours = False
        if not ours:
            raise InputError(f"{output}: not empty and not a result of `{COMMAND}`; choose another")


def _split(scene: Scene) -> tuple[tuple[int, ...], tuple[int, ...]]:
    if len(scene) < 3:
        raise InputError(
            f"{scene.root}: {len(scene)} posed view{'s' * (len(scene) != 1)}; reconstruction needs "
            "at least 3 (2 to fit, 1 held out to score)"
        )
    train, test = scene.held_out()
    if len(train) < 2 or not test:
        raise InputError(
            f"{scene.root}: the split leaves {len(train)} views to fit and {len(test)} to score; "
            "at least 2 and 1 are needed"
        )
    return train, test


def _load_views(scene: Scene, indices: tuple[int, ...], max_size: int) -> list[_View]:
    images, cameras = load_images(scene, indices, max_size)
    views = []
    for i, image, camera in zip(indices, images, cameras, strict=True):
        if min(camera.width, camera.height) < MIN_IMAGE_SIZE:
            raise InputError(
                f"{scene.image_paths[i]}: {camera.width}×{camera.height} pixels are too few to "
                f"reconstruct from; at least {MIN_IMAGE_SIZE} on each side are needed"
            )
        views.append(_View(scene.names[i], image, camera, load_mask(scene, i, max_size)))
    return views


def _trusted(
    scene: Scene, indices: tuple[int, ...], views: list[_View], generated_weight: float
) -> list[_View]:
    """In a folder of `see3d generate`: what its masks do not call known counts less."""
    made = _generated_views(scene)
    if not made or generated_weight == 1:
        return views
    trusted = []
    for i, view in zip(indices, views, strict=True):
        path = scene.image_paths[i]
        if path.parent.name == "views" and path.stem in made:
            mask = scene.root / "masks" / f"{path.stem}.png"
            known = read_image(mask, (view.camera.width, view.camera.height))[..., 0] / 255.0
            trust = (known + (1 - known) * generated_weight).astype(np.float32)
            view = dataclasses.replace(view, trust=trust)
        trusted.append(view)
    return trusted


def _generated_views(scene: Scene) -> tuple[str, ...]:
    """The names of the views that `see3d generate` made in this folder, if it did."""
    try:
        run = json.loads((scene.root / "run.json").read_text(encoding="utf-8"))
        if run.get("command") != "see3d generate":
            return ()
        names = tuple(map(str, run["views"]))
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        return ()
    missing = [n for n in names if not (scene.root / "masks" / f"{n}.png").is_file()]
    if missing:
        raise InputError(
            f"{scene.root / 'masks' / missing[0]}.png: is missing, so nobody can tell what was "
            "generated; generate the folder anew, or give --generated-weight 1"
        )
    return names


def _refined(
    scene: Scene, train: tuple[int, ...], test: tuple[int, ...], generated_weight: float
) -> RefinedCameras:
    """Cameras of the training and then the held-out views, by what is known in their photos."""
    indices = (*train, *test)
    views = _load_views(scene, indices, MATCHED_SIZE)
    views = _trusted(scene, indices, views, generated_weight)
    masks = []
    for view in views:
        known = None if view.trust is None else view.trust > 0.99
        masks.append(view.weight if known is None else known & (view.weight is None or view.weight))
    cameras = [view.camera for view in views]
    nearest, farthest = seeds.depth_range(
        cameras, None if scene.points is None else scene.points[0]
    )
    return refine_cameras(
        [view.image for view in views], cameras, masks,
        held_out=np.arange(len(views)) >= len(train),
        scene_size=float(np.sqrt(nearest * farthest)),
    )  # fmt: skip


def _with_depth(
    scene: Scene, indices: tuple[int, ...], views: list[_View], max_size: int
) -> list[_View]:
    if scene.depth_paths is None:
        raise InputError(
            f"{scene.root}: has no depth maps (depth_file_path); leave out --depth-weight"
        )
    return [
        dataclasses.replace(view, depth=load_depth(scene, i, max_size, may_be_empty=True))
        for i, view in zip(indices, views, strict=True)
    ]


def _with_points(scene: Scene, indices: tuple[int, ...], views: list[_View]) -> list[_View]:
    """With what each view saw of the sparse points, where the folder tells."""
    if scene.observations is None:
        return views
    seen = []
    for i, view in zip(indices, views, strict=True):
        camera, given = view.camera, scene.cameras[i]
        pixels, depths = point_depths(scene, i)
        pixels = pixels * (camera.width / given.width, camera.height / given.height)
        points = np.concatenate([pixels, depths[:, None]], 1).astype(np.float32)
        inside = (points >= 0) & (points < (camera.width, camera.height, np.inf))
        seen.append(dataclasses.replace(view, points=points[inside.all(1)]))
    return seen if any(len(view.points) for view in seen) else views


def _starting_points(
    scene: Scene,
    indices: tuple[int, ...],
    views: list[_View],
    num_gaussians: int,
    max_size: int,
    generator: np.random.Generator,
) -> tuple[seeds.Points, str]:
    """Sparse points where there are enough, else depth maps, else the photos themselves."""
    # Half of the Gaussians start on the points; the other half grows where it is needed.
    number = max(1, num_gaussians // 2)
    images, cameras = [view.image for view in views], [view.camera for view in views]
    masks = [view.weight for view in views]
    if scene.points is not None:
        xyz, rgb = scene.points
        finite = np.isfinite(xyz).all(1)
        if finite.sum() >= 100:
            points = (np.asarray(xyz, np.float64)[finite], rgb[finite] / 255.0)
            points = seeds.subsample(points, number, generator)
            fill = (num_gaussians - len(points[0])) // 2
            return seeds.fill_gaps(points, images, cameras, fill, generator), "sparse points"
    if scene.depth_paths is not None:
        depths = [load_depth(scene, i, max_size, may_be_empty=True) for i in indices]
        depths = [d if m is None else d * m for d, m in zip(depths, masks, strict=True)]
        points = seeds.from_depth_maps(images, depths, cameras, number, generator)
        if len(points[0]):
            # A generated view whose warp is all hole has none: its pixels are fitted all the same.
            bare = [view.name for view, d in zip(views, depths, strict=True) if not d.any()]
            return points, "depth maps" + (f" (none of {', '.join(bare)})" if bare else "")
    points = seeds.from_photos(images, cameras, number, generator, masks=masks)
    if not len(points[0]):
        raise InputError(f"{scene.root}: the masks leave no pixel to reconstruct from")
    return points, "photos"


def _canvas(views: list[_View]) -> tuple[int, int]:
    """(width, height) that holds every view, so that all sizes share one compiled program."""
    return max(v.camera.width for v in views), max(v.camera.height for v in views)


def _on_canvas(views: list[_View], canvas: tuple[int, int]) -> TrainingViews:
    width, height = canvas
    images = np.zeros((len(views), height, width, 3), np.uint8)
    weights = np.zeros((len(views), height, width), np.uint8)
    known = views[0].depth is not None
    depths = np.zeros((len(views), height, width), np.float32) if known else None
    for i, view in enumerate(views):
        rows, columns = view.image.shape[:2]
        images[i, :rows, :columns] = view.image
        counts = np.ones((rows, columns)) if view.weight is None else view.weight
        counts = counts if view.trust is None else counts * view.trust
        weights[i, :rows, :columns] = np.round(255 * counts)
        if depths is not None:
            depths[i, :rows, :columns] = view.depth
    points = None
    if views[0].points is not None:
        most = max(len(view.points) for view in views)
        points = np.zeros((len(views), most, 3), np.float32)
        for row, view in zip(points, views, strict=True):
            row[: len(view.points)] = view.points
    cameras = stack([view.camera.window(0, 0, *canvas) for view in views])
    weights = None if (weights == 255).all() else weights
    return TrainingViews(images, cameras, weights, depths, points)


def _with_poses(views: list[_View], poses: np.ndarray) -> list[_View]:
    return [
        dataclasses.replace(view, camera=dataclasses.replace(view.camera, world_to_camera=pose))
        for view, pose in zip(views, poses, strict=True)
    ]


def _render_view(
    gaussians: Gaussians, camera: Camera, canvas: tuple[int, int], near: float, capacity: int
) -> np.ndarray:
    """[H, W, 3] float32 in [0, 1]."""
    picture = render(gaussians, camera.window(0, 0, *canvas), near=near, capacity=capacity).rgb
    return np.clip(np.asarray(picture)[: camera.height, : camera.width], 0.0, 1.0)


def _per_view(views: list[_View], renders: list[np.ndarray]) -> list[dict[str, Any]]:
    rows = []
    for view, image in zip(views, renders, strict=True):
        truth = view.image / np.float32(255.0)
        row: dict[str, Any] = {"name": view.name, "psnr": None, "ssim": None}
        if view.weight is None or view.weight[5:-5, 5:-5].any():
            # JSON has no infinity: a perfect view counts as 100 dB.
            row["psnr"] = round(min(100.0, float(psnr(image, truth, view.weight))), 4)
            row["ssim"] = round(float(ssim(image, truth, view.weight)), 5)
        rows.append(row)
    return rows


def _scores(
    views: list[_View], renders: list[np.ndarray], psnr_name: str, ssim_name: str
) -> dict[str, float | None]:
    rows = [row for row in _per_view(views, renders) if row["psnr"] is not None]
    if not rows:
        return {psnr_name: None, ssim_name: None}
    return {
        psnr_name: round(float(np.mean([row["psnr"] for row in rows])), 4),
        ssim_name: round(float(np.mean([row["ssim"] for row in rows])), 5),
    }


def _write(
    output: Path,
    result: FitResult,
    metrics: dict[str, Any],
    train: list[_View],
    test: list[_View],
    renders: list[np.ndarray],
    frames: list[np.ndarray],
) -> None:
    shown = np.unique(np.linspace(0, len(test) - 1, min(len(test), SHEET_COLUMNS)).astype(int))
    scores = [metrics["per_view"][i]["psnr"] for i in shown]
    sheet = contact_sheet(
        [[test[i].image for i in shown], [renders[i] for i in shown]],
        row_labels=["photo", "scene"],
        column_labels=[
            test[i].name + ("" if score is None else f"  {score:.1f} dB")
            for i, score in zip(shown, scores, strict=True)
        ],
        cell_height=240,
    )
    with atomic_path(output) as folder:
        folder.mkdir()
        write_ply(folder / "point_cloud.ply", jax.tree.map(np.asarray, result.gaussians))
        write_cameras(folder / CAMERAS_FILE, {v.name: v.camera for v in (*train, *test)})
        write_image(folder / "renders.png", sheet)
        for view, picture in zip(test, renders, strict=True):
            write_image(folder / "renders" / f"{view.name}.png", picture)
        write_mp4(folder / "orbit.mp4", [*frames, *frames[-2:0:-1]], fps=30)
        write_json(folder / "metrics.json", metrics)
