"""From photos to a scene in one go: cameras, depth, new views, Gaussians, a page to look at.

    OUTPUT/photos/       copies, when single photos were given
    OUTPUT/cameras/      structure from motion, when the photos have no cameras
    OUTPUT/scene/        photos with cameras and aligned depth (transforms.json)
    OUTPUT/views/        generated views beside the photos, as of `see3d generate`
    OUTPUT/gaussians/    point_cloud.ply, orbit.mp4, metrics.json, as of `see3d reconstruct`
    OUTPUT/report.html   all of it on one page, with the scene to turn around in
    OUTPUT/create.json   what was asked for, and the seconds of every stage

Each is made once (`pipelines.stages`): what was killed goes on where it stopped, and other settings
repeat only what depends on them.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from see3d_jax.errors import InputError
from see3d_jax.files import atomic_path, write_json
from see3d_jax.geometry.scene_files import PosedImages, write_transforms
from see3d_jax.geometry.trajectories import MOVES
from see3d_jax.media import image_size, write_image
from see3d_jax.pipelines.create_plan import (
    FIT_SIDE,
    PRESETS,
    Network,
    Plan,
    make_plan,
    read_network,
)
from see3d_jax.pipelines.depth import reference_depths
from see3d_jax.pipelines.depth_model import load_depth_model
from see3d_jax.pipelines.export import write_generated
from see3d_jax.pipelines.generation import INTERPOLATE, generate, open_source
from see3d_jax.pipelines.inputs import (
    Scene,
    check_photo,
    has_cameras,
    list_photos,
    load_depth,
    load_images,
    load_scene,
    unique_names,
)
from see3d_jax.pipelines.pretrained import checkpoint_folder
from see3d_jax.pipelines.reconstruct import reconstruct
from see3d_jax.pipelines.scene_page import write_scene_page
from see3d_jax.pipelines.stages import Stages, digest
from see3d_jax.pipelines.warps import View

MAX_PHOTOS = 40  # stereo and matching of more take longer than anyone waits here
_SCENE_SIDE = 640  # pixels, the longer side of the photos in OUTPUT/scene


@dataclasses.dataclass(frozen=True)
class Created:
    """What `create` made.

    Attributes:
      output: the result folder; report, gaussians, video: the files to look at first.
      metrics: of the fit, on held-out views.
      seconds: of every stage, by name; stages done earlier keep the seconds they took then.
      notes: what was odd about the input.
    """

    output: Path
    report: Path
    gaussians: Path
    video: Path
    metrics: dict[str, Any]
    seconds: dict[str, float]
    notes: tuple[str, ...]


def create(
    photos: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    preset: str = "normal",
    checkpoint: str | os.PathLike[str] | None = None,
    depth: str | os.PathLike[str] | None = None,
    depth_kind: str | None = None,
    trajectory: str | None = None,
    views: int | None = None,
    fov: float | None = None,
    steps: int | None = None,
    seed: int = 0,
    announce: Callable[[Plan], None] = lambda plan: None,
    report: Callable[[str], None] = lambda text: None,
    progress: bool = True,
) -> Created:
    """Makes a scene of 3D Gaussians from photos.

    Args:
      photos: one or more photos; or one folder: of photos, or a posed scene.
      output: result folder; a run that was stopped goes on there.
      preset: key of `create_plan.PRESETS`, how much work to put in.
      checkpoint: as of `generation.generate`.
      depth: planar depth of a single photo, or a depth network (.onnx) of `depth_kind`.
      trajectory: as of `generation.generate`; default through the photos, around a single one.
      views: how many to generate; default the preset's.
      fov: horizontal field of view of a single photo, degrees.
      steps: of the sampler; default what the model was evaluated with.
      seed: same seed, same scene.
      announce: called with the plan before any work; report: called with one line per stage.
      progress: show the bar of the fit.

    Raises InputError for anything wrong with these, before any work where possible.
    """
    output = Path(output)
    if preset not in PRESETS:
        raise InputError(f"--preset {preset}: expected one of {', '.join(PRESETS)}")
    if views is not None and views < 3:
        raise InputError(f"--views must be at least 3 (2 to fit, 1 held out), got {views}")
    chosen = PRESETS[preset]
    count = views or chosen.views
    source, files, posed = _check_input([Path(photo) for photo in photos])
    depth = None if depth is None else Path(depth)
    _check_depth(source, files, posed, depth, depth_kind)
    if trajectory is not None:
        _check_trajectory(trajectory, len(files))
    checkpoint = None if checkpoint is None else Path(checkpoint)
    network = read_network(checkpoint, min(2, len(files)), steps)
    stages = Stages(output, report)
    width, height = image_size(files[0])
    announce(
        make_plan(
            photos=len(files), posed=posed, depth=depth, checkpoint=checkpoint, network=network,
            preset=chosen, views=count, aspect=max(width, height) / min(width, height),
        )
    )  # fmt: skip
    notes: list[str] = []

    given = {file.name: digest(file) for file in files}
    if source is None:
        source = stages.run("photos", given, lambda target: _copy(files, target))
    key = {"photos": given, "fov": fov, "depth": depth and digest(depth), "kind": depth_kind}
    if posed:
        key["scene"] = digest(source if source.is_dir() else source.parent)
    scene = stages.run(
        "scene", key,
        lambda target: _make_scene(source, output, depth, depth_kind, fov, target),
    )  # fmt: skip
    posed_scene = load_scene(scene)
    lost = len(files) - len(posed_scene)
    sizes = dict.fromkeys("{}×{}".format(*image_size(file)) for file in files)
    if len(sizes) > 1:
        notes.append(
            f"the photos differ in size ({', '.join(sizes)}): each keeps its own, the views have "
            "the shape of the first; the model is shown the middle of the others"
        )
    if lost:
        notes.append(f"{lost} of {len(files)} photos fit nowhere or have no depth: left out")
    path = trajectory or (INTERPOLATE if len(posed_scene) > 1 else "orbit")
    settings = {
        "trajectory": path, "views": count, "steps": steps, "seed": seed,
        "file": digest(Path(path)) if Path(path).exists() else None, "preset": preset,
        "weights": digest(network.weights),
    }  # fmt: skip
    made = stages.run(
        "views", settings,
        lambda target: _make_views(
            scene, target, network, path, count, checkpoint, steps, seed,
            max(chosen.side, network.image_size), chosen.views_per_round,
        ),
    )  # fmt: skip
    fitted: dict[str, Any] = {"steps": chosen.steps, "num_gaussians": chosen.gaussians}
    fit = stages.run(
        "gaussians", fitted,
        lambda target: reconstruct(
            made, target, seed=seed, max_size=FIT_SIDE, progress=progress, **fitted
        ),
    )  # fmt: skip
    write_json(
        output / "create.json",
        {
            "command": "see3d create", "photos": [file.name for file in files], "preset": preset,
            "notes": notes, "seconds": stages.seconds,
            "checkpoint": str(checkpoint_folder(checkpoint)), **settings,
        },
    )  # fmt: skip
    metrics = write_scene_page(output)
    return Created(
        output=output, report=output / "report.html", gaussians=fit / "point_cloud.ply",
        video=fit / "orbit.mp4", metrics=metrics, seconds=stages.seconds, notes=tuple(notes),
    )  # fmt: skip


# --- what is given ------------------------------------------------------------------------------


def _check_input(paths: list[Path]) -> tuple[Path | None, list[Path], bool]:
    """(folder or photo to open, or None where photos are still to be copied; photos; posed?)."""
    if not paths:
        raise InputError("create: give one or more photos, or a folder of them")
    if len(paths) == 1 and (paths[0].is_dir() or paths[0].suffix == ".json"):
        source = paths[0]
        if source.suffix == ".json" or has_cameras(source):
            files, posed = list(load_scene(source).image_paths), True
        else:
            files, posed = list_photos(source), False
    else:
        files, posed = paths, False
        for path in paths:
            if path.is_dir():
                raise InputError(f"{path}: is a folder; give one folder alone, or only photos")
            if not path.is_file():
                raise InputError(f"{path}: no such photo")
            check_photo(path)
        source = paths[0] if len(paths) == 1 else None
    if len(files) > MAX_PHOTOS:
        every = -(-len(files) // MAX_PHOTOS)
        where = paths[0] if len(paths) == 1 else "create"
        raise InputError(
            f"{where}: {len(files)} photos are too many to fill in between (at most {MAX_PHOTOS}); "
            f"give every {every}th of them, or fit the scene to all: see3d reconstruct --input "
            f"{where if len(paths) == 1 else 'FOLDER'} --output DIR"
        )
    for file in files:
        image_size(file)  # readable? HEIC without its package is told here
    return source, files, posed


def _check_depth(
    source: Path | None, files: list[Path], posed: bool, depth: Path | None, kind: str | None
) -> None:
    learned = depth is not None and depth.suffix.lower() == ".onnx"
    if kind is not None and not learned:
        raise InputError("--depth-kind says what a depth model outputs; give --depth MODEL.onnx")
    if depth is not None and not depth.is_file():
        raise InputError(f"{depth}: no such depth file")
    if len(files) > 1 and depth is not None and not learned:
        raise InputError(
            f"--depth {depth}: a depth map is of one photo; for {len(files)} photos give a depth "
            "network (.onnx), or leave it out: stereo finds their depth"
        )
    if len(files) == 1 and depth is None and not (posed and load_scene(source).depth_paths):
        raise InputError(
            f"{files[0]}: one photo alone shows no depth; add --depth with a depth map (.npy, "
            "16-bit .png) or a depth network (MODEL.onnx, an export of Depth Anything V2 or MoGe), "
            "or give two or more photos taken from different places"
        )


def _check_trajectory(trajectory: str, photos: int) -> None:
    if trajectory == INTERPOLATE and photos < 2:
        raise InputError("--trajectory interpolate: goes through two or more photos; give orbit")
    if trajectory not in (*MOVES, INTERPOLATE) and not Path(trajectory).exists():
        raise InputError(
            f"--trajectory {trajectory}: neither one of {', '.join((*MOVES, INTERPOLATE))} nor an "
            "existing file"
        )


def _copy(files: list[Path], target: Path) -> None:
    with atomic_path(target) as folder:
        folder.mkdir()
        for file, stem in zip(files, unique_names([file.name for file in files]), strict=True):
            shutil.copyfile(file, folder / f"{stem}{file.suffix}")


# --- stages -------------------------------------------------------------------------------------


def _make_scene(
    source: Path, output: Path, depth: Path | None, kind: str | None, fov: float | None,
    target: Path,
) -> None:  # fmt: skip
    """Photos with cameras and depth, all aligned: a scene folder that needs nothing else."""
    model = load_depth_model(depth, kind) if depth and depth.suffix.lower() == ".onnx" else None
    file = None if model else depth
    scene = open_source(source, file, "orbit", fov, output / "cameras", None, model is not None)
    chosen = list(range(len(scene)))
    images, cameras = load_images(scene, max_size=_SCENE_SIDE)
    if scene.depth_paths is not None and model is None:
        depths = [load_depth(scene, i, _SCENE_SIDE) for i in chosen]
        depth_from = "file"
    else:
        depths, depth_from = reference_depths(scene, chosen, images, cameras, _SCENE_SIDE, model)
    kept = [i for i in chosen if (depths[i] > 0).any()]
    names = [scene.names[i] for i in kept]
    with atomic_path(target) as folder:
        for name, i in zip(names, kept, strict=True):
            write_image(folder / "images" / f"{name}.png", images[i])
            (folder / "depth").mkdir(exist_ok=True)
            np.save(folder / "depth" / f"{name}.npy", depths[i])
        posed = PosedImages(
            files=tuple(f"images/{name}.png" for name in names),
            cameras=tuple(cameras[i] for i in kept),
            depth_files=tuple(f"depth/{name}.npy" for name in names),
            depth_unit=1.0,
        )
        write_transforms(folder / "transforms.json", posed)
        write_json(folder / "made.json", {"photos": len(chosen), "depth_from": depth_from})


def _make_views(
    scene: Path, target: Path, network: Network, path: str, views: int, checkpoint: Path | None,
    steps: int | None, seed: int, side: int, views_per_round: int | None,
) -> None:  # fmt: skip
    """Generated views, and beside them every photo in the detail the fit can use."""
    posed = load_scene(scene)
    number = min(len(posed), network.max_references)
    references = np.unique(np.linspace(0, len(posed) - 1, number).round().astype(int)).tolist()
    rounds = target.with_name("rounds")
    result = generate(
        scene, trajectory=path, checkpoint=checkpoint, references=references, views=views,
        steps=steps, size=side, composite=True, views_per_round=views_per_round,
        rounds_folder=rounds, seed=seed,
    )  # fmt: skip
    write_generated(result, target, _photos(posed))
    shutil.rmtree(rounds, ignore_errors=True)


def _photos(scene: Scene) -> dict[str, View]:
    """All photos of the scene, in the detail that the fit can use."""
    images, cameras = load_images(scene, max_size=FIT_SIDE)
    depths = [load_depth(scene, i, FIT_SIDE) for i in range(len(scene))]
    return {
        name: View(*parts)
        for name, *parts in zip(scene.names, images, depths, cameras, strict=True)
    }
