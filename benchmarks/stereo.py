"""How right weight-free stereo is, against exact depth, sparse points or a measured disparity.

    python -m benchmarks.stereo [--scene DIR ...] [--pair DIR] [--json FILE]

A scene is judged at evenly chosen views, each with its two neighbours: against its depth maps, else
its sparse points; a scene that has neither gets cameras and points from its photos (pycolmap). A
pair is a folder with two rectified pictures (*left*, *right*), calib.json (fx, cx_left, cx_right,
cy, baseline_m) and disp_depth.npz (depth_m of the left one). Numbers are medians over the views:
`median_rel_error` of the depth, `bad_share` more than 5 % off, `known_share` of the judged places
that have a depth at all.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import click
import numpy as np

from see3d_jax.errors import InputError, run_command
from see3d_jax.files import write_json
from see3d_jax.geometry.cameras import Camera, intrinsics_matrix
from see3d_jax.media import image_size, read_image
from see3d_jax.pipelines.depth import point_depths, reference_depths, stereo, stereo_references
from see3d_jax.pipelines.inputs import Scene, load_depth, load_images, load_scene
from see3d_jax.pipelines.sfm import find_cameras
from see3d_jax.pipelines.warps import resize_depth

VIEWS, SIDE = 5, 512


@click.command(
    epilog="""\b
Examples:
  python -m benchmarks.stereo --scene scene_with_depth --scene colmap_scene --json stereo.json
"""
)
@click.option("--scene", "scenes", type=click.Path(path_type=Path), multiple=True)
@click.option("--pair", type=click.Path(path_type=Path), help="Rectified pair with depth.")
@click.option("--views", type=click.IntRange(1), default=VIEWS, show_default=True)
@click.option("--json", "output", type=click.Path(path_type=Path), help="Also write the numbers.")
def app(scenes: tuple[Path, ...], pair: Path | None, views: int, output: Path | None) -> None:
    """Prints errors of stereo depth."""
    numbers = {folder.name: scene_errors(folder, views) for folder in scenes}
    if pair is not None:
        numbers[pair.name] = pair_errors(pair)
    if not numbers:
        raise InputError("give a --scene or a --pair to measure")
    for name, row in numbers.items():
        click.echo(f"{name:24} " + "  ".join(f"{key} {value}" for key, value in row.items()))
    if output is not None:
        write_json(output, numbers)


def scene_errors(folder: Path, views: int = VIEWS) -> dict[str, float | str]:
    """Errors over `views` evenly chosen views of a scene, each with two neighbours."""
    scene = load_scene(folder)
    if scene.depth_paths is None and scene.points is None:
        with tempfile.TemporaryDirectory() as place:
            return _errors(load_scene(find_cameras(folder, Path(place) / "cameras")), views)
    return _errors(scene, views)


def _errors(scene: Scene, views: int) -> dict[str, float | str]:
    blind = Scene(
        scene.root, scene.names, scene.image_paths, scene.cameras, points=scene.points,
        observations=scene.observations,
    )  # fmt: skip
    rows = []
    for i in np.unique(np.linspace(0, len(scene) - 1, views).round().astype(int)):
        chosen = stereo_references(blind, int(i))
        images, cameras = load_images(scene, tuple(chosen), SIDE)
        found = reference_depths(blind, chosen, images, cameras, SIDE)[0][0]
        if scene.depth_paths is not None:
            truth = load_depth(scene, int(i), SIDE)
            rows.append(_compare(found[truth > 0], truth[truth > 0]))
        else:
            pixels, depths = point_depths(scene, int(i))
            shrink = cameras[0].width / scene.cameras[i].width
            column, row = (pixels * shrink).astype(int).T
            height, width = found.shape
            inside = (column >= 0) & (row >= 0) & (column < width) & (row < height)
            rows.append(_compare(found[row[inside], column[inside]], depths[inside]))
    against = "depth" if scene.depth_paths is not None else "points"
    return {"against": against, **_medians(rows)}


def pair_errors(folder: Path) -> dict[str, float | str]:
    """Errors of a rectified pair's left view."""
    calibration = json.loads((folder / "calib.json").read_text(encoding="utf-8"))
    images, cameras = [], []
    for side, shift in (("left", 0.0), ("right", calibration["baseline_m"])):
        file = next(folder.glob(f"*{side}*.png"))
        pose = np.eye(4, dtype=np.float32)
        pose[0, 3] = -shift
        focal, centre = calibration["fx"], calibration[f"cx_{side}"]
        matrix = intrinsics_matrix(focal, focal, centre, calibration["cy"])
        cameras.append(Camera(matrix, pose, *image_size(file)))
        images.append(read_image(file))
    found = stereo(images, cameras)[0]
    with np.load(folder / "disp_depth.npz") as arrays:
        truth = np.nan_to_num(arrays["depth_m"].astype(np.float32), posinf=0)
    truth = resize_depth(truth, found.shape[1], found.shape[0])
    return {"against": "depth", **_medians([_compare(found[truth > 0], truth[truth > 0])])}


def _compare(found: np.ndarray, truth: np.ndarray) -> tuple[float, float, float]:
    known = found > 0
    error = np.abs(found[known] / truth[known] - 1)
    if not known.any():
        return np.nan, np.nan, 0.0
    return float(np.median(error)), float((error > 0.05).mean()), float(known.mean())


def _medians(rows: list[tuple[float, float, float]]) -> dict[str, float]:
    if not rows or np.isnan(rows).all(0).any():
        raise InputError("stereo found no depth in any of the views")
    values = np.nanmedian(np.array(rows), 0).round(4).tolist()
    worst = round(float(np.nanmax([row[0] for row in rows])), 4)
    names = ("median_rel_error", "bad_share", "known_share")
    return {**dict(zip(names, values, strict=True)), "worst_view_rel_error": worst}


if __name__ == "__main__":
    run_command(lambda: app(standalone_mode=False))
