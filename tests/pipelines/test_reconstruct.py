"""Posed photos in, a scene with scores out; same seed, same bytes; bad input in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from skimage import data

from see3d_jax.errors import InputError
from see3d_jax.geometry.cameras import Camera, intrinsics_matrix, look_at, project, unproject
from see3d_jax.geometry.colmap_files import read_colmap, write_colmap
from see3d_jax.geometry.scene_files import PointCloud, PosedImages, read_inria_cameras
from see3d_jax.media import read_image, write_image
from see3d_jax.pipelines.flight import camera_path
from see3d_jax.pipelines.inputs import has_cameras
from see3d_jax.pipelines.reconstruct import reconstruct
from see3d_jax.splatting.fit import TrainingViews, fit
from see3d_jax.splatting.fit_step import FitConfig, fit_step
from see3d_jax.splatting.formats import read_ply
from see3d_jax.splatting.gaussians import from_points
from see3d_jax.splatting.render import render

SIZE = (48, 40)  # width, height
VIEWS = 10
SMALL = {"num_gaussians": 500, "max_size": 48, "sh_degree": 1, "orbit_frames": 6, "progress": False}


def cameras(count: int = VIEWS) -> list[Camera]:
    angles = np.linspace(-0.5, 0.5, count)
    intrinsics = intrinsics_matrix(50, 50, SIZE[0] / 2, SIZE[1] / 2)
    return [
        Camera(intrinsics, look_at((3 * np.sin(a), -0.3, -3 * np.cos(a)), (0, 0, 0)), *SIZE)
        for a in angles
    ]


def write_scene(folder: Path, count: int = VIEWS, depth: bool = False) -> Path:
    """A curved, photo-textured wall rendered from an arc of cameras, as a nerfstudio folder."""
    photo = data.astronaut()[::8, ::8] / 255.0
    rows, columns = np.mgrid[0:64, 0:64]
    x, y = (columns - 32) / 20, (rows - 32) / 20
    points = np.stack([x, y, 0.3 * np.cos(2 * x)], -1).reshape(-1, 3)
    wall = from_points(points, photo.reshape(-1, 3), 4096, 0, opacity=0.95)
    frames = []
    for i, camera in enumerate(cameras(count)):
        picture = render(wall, camera)
        write_image(folder / f"images/{i:03d}.png", np.asarray(picture.rgb))
        frame = {
            "file_path": f"images/{i:03d}.png",
            "transform_matrix": (
                np.linalg.inv(camera.world_to_camera) @ np.diag([1, -1, -1, 1])
            ).tolist(),
        }
        if depth:
            mean = np.array(picture.depth / jnp.maximum(picture.alpha, 1e-6))
            mean[np.asarray(picture.alpha) < 0.5] = 0
            np.save(folder / f"images/{i:03d}.npy", mean)
            frame["depth_file_path"] = f"images/{i:03d}.npy"
        frames.append(frame)
    header = dict(fl_x=50, fl_y=50, cx=SIZE[0] / 2, cy=SIZE[1] / 2, w=SIZE[0], h=SIZE[1])
    header["depth_unit_scale_factor"] = 1.0
    (folder / "transforms.json").write_text(json.dumps({**header, "frames": frames}))
    return folder


@pytest.fixture(scope="module")
def scene_folder(tmp_path_factory) -> Path:
    return write_scene(tmp_path_factory.mktemp("scene"), depth=True)


@pytest.fixture(scope="module")
def result(scene_folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("results") / "first"
    compiled_before = fit_step._cache_size()
    metrics = reconstruct(scene_folder, output, steps=120, seed=3, **SMALL)
    return output, metrics, fit_step._cache_size() - compiled_before


def test_the_cameras_of_all_views_lie_beside_the_scene(result):
    read = read_inria_cameras(result[0] / "cameras.json")
    assert read.files == tuple(f"{i:03d}" for i in range(VIEWS))
    for found, camera in zip(read.cameras, cameras()):
        np.testing.assert_allclose(found.world_to_camera, camera.world_to_camera, atol=1e-5)
    assert not has_cameras(result[0])  # it is no scene of photos


def test_unseen_views_are_recognisable_and_scores_are_written(result):
    output, metrics, compiled = result
    assert metrics["psnr"] > 19 and metrics["ssim"] > 0.75, metrics
    assert metrics["train_psnr"] > 20
    assert metrics["num_test_views"] == 2 and metrics["num_train_views"] == 8
    assert json.loads((output / "metrics.json").read_text()) == metrics
    assert [row["name"] for row in metrics["per_view"]] == ["000", "008"]
    assert metrics["num_gaussians"] == read_ply(output / "point_cloud.ply").count
    assert read_image(output / "renders.png").shape[1] > 2 * SIZE[0]
    assert (output / "orbit.mp4").stat().st_size > 500
    # the scene grew to its capacity and the programs were compiled once
    assert metrics["num_gaussians"] == SMALL["num_gaussians"] and compiled == 1


def test_same_seed_gives_the_same_bytes_and_replaces_an_earlier_result(
    scene_folder, result, tmp_path
):
    first, metrics, _ = result
    again = reconstruct(scene_folder, tmp_path / "again", steps=120, seed=3, **SMALL)
    assert again["psnr"] == metrics["psnr"]
    ply = (tmp_path / "again/point_cloud.ply").read_bytes()
    assert ply == (first / "point_cloud.ply").read_bytes()
    reconstruct(scene_folder, tmp_path / "again", steps=3, seed=4, **SMALL)
    assert ply != (tmp_path / "again/point_cloud.ply").read_bytes()


def test_a_view_without_any_depth_is_fitted_all_the_same(scene_folder, tmp_path):
    """As `see3d generate` leaves it when nothing given is visible from there: a warp all hole."""
    folder = shutil.copytree(scene_folder, tmp_path / "scene")
    np.save(folder / "images/003.npy", np.zeros(SIZE[::-1], np.float32))
    config = FitConfig(depth_weight=0.05)
    metrics = reconstruct(folder, tmp_path / "out", steps=3, config=config, **SMALL)
    assert metrics["starting_points"] == "depth maps (none of 003)"
    assert metrics["num_train_views"] == 8 and np.isfinite(metrics["psnr"])


def test_without_depth_masks_and_sizes_may_differ(scene_folder, tmp_path):
    """Photos alone, one of them smaller, a splits.json, and a mask that hides a spoiled corner."""
    folder = write_scene(tmp_path / "scene")
    content = json.loads((folder / "transforms.json").read_text())
    for i, frame in enumerate(content["frames"]):
        image = read_image(folder / frame["file_path"]).copy()
        image[:16, :16] = (255, 0, 255)
        mask = np.full(image.shape[:2], 255, np.uint8)
        mask[:16, :16] = 0
        if i == 4:
            image, mask = image[:36], mask[:36]
            frame["h"] = 36
        write_image(folder / frame["file_path"], image)
        frame["mask_path"] = f"images/mask_{i}.png"
        Image.fromarray(mask).save(folder / frame["mask_path"])
    (folder / "transforms.json").write_text(json.dumps(content))
    (folder / "splits.json").write_text(json.dumps({"test": [2, 4]}))
    metrics = reconstruct(folder, tmp_path / "out", steps=120, **SMALL)
    assert metrics["starting_points"] == "photos"
    assert [row["name"] for row in metrics["per_view"]] == ["002", "004"]
    assert metrics["psnr"] > 18, metrics  # the magenta corner alone would cost more
    gaussians = read_ply(tmp_path / "out/point_cloud.ply")
    corner = np.asarray(render(gaussians, cameras()[2]).rgb)[:12, :12]
    magenta = np.minimum(corner[..., 0], corner[..., 2]) - corner[..., 1]
    assert magenta.mean() < 0.3  # 1 where the mask was ignored


def with_tracks(scene: Path, folder: Path) -> tuple[Path, np.ndarray]:
    """The same photos as a COLMAP model whose 200 points are seen by all views but view 3."""
    rows, columns = np.mgrid[0:10, 0:20]
    x, y = (columns.ravel() - 10) / 10, (rows.ravel() - 5) / 10
    xyz = np.stack([x, y, 0.3 * np.cos(2 * x)], -1).astype(np.float32)
    seen = []
    for i, camera in enumerate(cameras()):
        pixels = np.asarray(project(camera, xyz)[0])
        inside = ((pixels > 1) & (pixels < np.array(SIZE) - 1)).all(1) & (i != 3)
        seen.append((pixels[inside].astype(np.float32), np.flatnonzero(inside)))
    files = tuple(f"{i:03d}.png" for i in range(VIEWS))
    points = PointCloud(xyz, np.full((200, 3), 128, np.uint8))
    shutil.copytree(scene / "images", folder / "images", ignore=shutil.ignore_patterns("*.npy"))
    model = PosedImages(files, tuple(cameras()), points=points, observations=tuple(seen))
    (folder / "sparse/0").mkdir(parents=True)
    write_colmap(folder / "sparse/0", model)
    return folder, xyz


def test_a_fit_keeps_to_the_points_that_colmap_saw(scene_folder, tmp_path, monkeypatch):
    folder, xyz = with_tracks(scene_folder, tmp_path / "scene")
    handed = []

    def noted(views: TrainingViews, *arguments, **options):
        handed.append(views)
        return fit(views, *arguments, **options)

    monkeypatch.setattr("see3d_jax.pipelines.reconstruct.fit", noted)
    small = {**SMALL, "max_size": 40}
    metrics = reconstruct(folder, tmp_path / "out", steps=3, **small)
    assert metrics["weights"]["points"] == FitConfig().points_weight
    points = handed[0].points
    assert len(points) == 8 and not points[2].any()  # views 0 and 8 are held out; 3 saw none
    # The pixels of the smaller photos and the depths there lead back to the points.
    for row, view in ((0, 1), (7, 9)):
        known = points[row][points[row][:, 2] > 0].astype(np.float64)
        camera = handed[0].cameras[row]
        lifted = np.asarray(unproject(jax.tree.map(np.asarray, camera), known[:, :2], known[:, 2]))
        index = read_colmap(folder / "sparse/0").observations[view][1]
        np.testing.assert_allclose(lifted, xyz[index], atol=1e-4)
    # Nothing of it where it is not wanted, where cameras are known to be wrong, or without tracks.
    for config in (FitConfig(points_weight=0.0), FitConfig(refine_poses=True)):
        metrics = reconstruct(folder, tmp_path / "out", steps=3, config=config, **small)
        assert handed[-1].points is None and metrics["weights"]["points"] is None
    metrics = reconstruct(scene_folder, tmp_path / "out", steps=3, **small)
    assert handed[-1].points is None and metrics["weights"]["points"] is None


def test_refinement_costs_exact_cameras_nothing(scene_folder, result, tmp_path):
    metrics = reconstruct(scene_folder, tmp_path / "out", steps=120, seed=3, refine_poses=True,
                          **SMALL)  # fmt: skip
    # Eight views of 48 × 40 pixels, in which turning and shifting a camera look much alike.
    assert metrics["refined_poses"] is True and metrics["bundle"]["moved"] is False, metrics
    assert metrics["psnr"] == result[1]["psnr"]


def test_poses_refined_in_the_fit_are_used_for_scoring(scene_folder, tmp_path):
    config = FitConfig(refine_poses=True)
    metrics = reconstruct(scene_folder, tmp_path / "out", steps=120, config=config, **SMALL)
    # The cameras were right already: few tiny views can only get worse, but not come apart.
    assert metrics["refined_poses"] is True and metrics["train_psnr"] > 22, metrics
    assert metrics["psnr"] > 16 and metrics["bundle"] is None, metrics


def test_the_flight_is_smooth_and_stays_near_the_cameras():
    shuffled = [cameras(12)[i] for i in np.random.default_rng(0).permutation(12)]
    path = camera_path(shuffled, 40)
    centres = np.stack([np.asarray(camera.position) for camera in path])
    steps = np.linalg.norm(np.diff(centres, axis=0), axis=1)
    assert steps.max() < 3 * np.median(steps)
    given = np.stack([np.asarray(camera.position) for camera in shuffled])
    gap = np.linalg.norm(centres[:, None] - given[None], axis=-1).min(1)
    assert gap.max() < 0.3


def spoil(folder: Path, kind: str) -> dict:
    """Breaks a scene folder in one way; returns options for the call."""
    content = json.loads((folder / "transforms.json").read_text())
    if kind == "one view":
        content["frames"] = content["frames"][:1]
    elif kind == "no views":
        content["frames"] = []
    elif kind == "missing image":
        (folder / "images/003.png").unlink()
    elif kind == "other image size":
        Image.new("RGB", (30, 30)).save(folder / "images/003.png")
    elif kind == "NaN pose":
        content["frames"][1]["transform_matrix"][0][0] = float("nan")
    elif kind == "no depth":
        for frame in content["frames"]:
            del frame["depth_file_path"]
    elif kind == "all held out":
        (folder / "splits.json").write_text(json.dumps({"test": list(range(VIEWS))}))
    (folder / "transforms.json").write_text(json.dumps(content))
    return {
        "no depth": {"config": FitConfig(depth_weight=0.1)}, "heavy": {"generated_weight": 2.0},
        "unknown growth": {"config": FitConfig(densify="wild")},
        "negative weight": {"config": FitConfig(smooth_weight=-1.0)},
        "no number": {"config": FitConfig(points_weight=float("nan"))},
        "steps 0": {"steps": 0}, "no gaussians": {"num_gaussians": 0}, "degree 4": {"sh_degree": 4},
        "too small": {"max_size": 8},
    }.get(kind, {})  # fmt: skip


@pytest.mark.parametrize(
    "kind",
    [
        "one view", "no views", "missing image", "other image size", "NaN pose", "all held out",
        "steps 0", "no gaussians", "degree 4", "too small", "missing folder", "empty folder",
        "foreign output", "no depth", "heavy", "unknown growth", "negative weight",
        "no number",
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_leaves_nothing(scene_folder, tmp_path, kind):
    import shutil

    source, output = tmp_path / "scene", tmp_path / "out"
    if kind == "empty folder":
        source.mkdir()
    elif kind != "missing folder":
        shutil.copytree(scene_folder, source)
    options = spoil(source, kind) if (source / "transforms.json").is_file() else {}
    if kind == "foreign output":
        output.mkdir()
        (output / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError) as caught:
        reconstruct(source, output, **{"steps": 5, **SMALL, **options})
    assert "\n" not in str(caught.value)
    left = sorted(path.name for path in tmp_path.iterdir())
    if kind == "foreign output":
        assert (output / "thesis.tex").read_text() == "years of work"
    else:
        assert "out" not in left


@pytest.mark.slow
def test_a_real_posed_scene_is_reconstructed(shared, tmp_path):
    """A few seconds' worth of a COLMAP model: far from good, but the facade must be there."""
    options = {**SMALL, "num_gaussians": 1500, "max_size": 96}
    metrics = reconstruct(
        shared / "data/posed/sceaux_castle", tmp_path / "out", steps=150, **options
    )
    assert metrics["starting_points"] == "sparse points"
    assert metrics["psnr"] > 12 and metrics["train_psnr"] > 14, metrics


def generated_folder(folder: Path) -> Path:
    """As `see3d generate` writes it: two photos, and views whose right halves a model made up."""
    write_scene(folder, depth=True)
    content = json.loads((folder / "transforms.json").read_text())
    names = []
    for i, frame in enumerate(content["frames"]):
        image, reference = read_image(folder / frame["file_path"]).copy(), i in (2, 7)
        known = np.full(image.shape[:2], 255, np.uint8)
        if not reference:
            known[:, 24:] = 0
            image[:, 24:] = (255, 0, 255)
            names.append(f"{i:05d}")
            write_image(folder / f"masks/{i:05d}.png", known)
        frame["file_path"] = f"{'references' if reference else 'views'}/{i:05d}.png"
        write_image(folder / frame["file_path"], image)
    (folder / "transforms.json").write_text(json.dumps(content))
    (folder / "splits.json").write_text(json.dumps({"test": [5]}))
    (folder / "run.json").write_text(json.dumps({"command": "see3d generate", "views": names}))
    return folder


def test_generated_pixels_count_less_than_photographed_ones(tmp_path):
    folder = generated_folder(tmp_path / "views")
    magenta = []
    for weight in (0.0, 0.9):
        out = tmp_path / f"out_{weight}"
        metrics = reconstruct(folder, out, steps=100, generated_weight=weight, **SMALL)
        picture = np.asarray(render(read_ply(out / "point_cloud.ply"), cameras()[4]).rgb)[:, 30:]
        magenta.append((np.minimum(picture[..., 0], picture[..., 2]) - picture[..., 1]).mean())
        assert metrics["weights"]["generated"] == weight
    assert magenta[0] < 0.5 * magenta[1], magenta
    (folder / "masks/00004.png").unlink()
    with pytest.raises(InputError, match=r"masks/00004\.png: is missing"):
        reconstruct(folder, tmp_path / "none", steps=3, **SMALL)


def test_a_killed_reconstruction_goes_on_and_cleans_up(scene_folder, tmp_path, monkeypatch):
    from see3d_jax.pipelines import reconstruct as module
    from see3d_jax.splatting import fit as fit_module

    monkeypatch.setattr(fit_module, "SAVE_EVERY", 50)
    monkeypatch.setattr(module, "_write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        reconstruct(scene_folder, tmp_path / "out", steps=120, seed=3, **SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["out_partial.npz"]
    monkeypatch.undo()
    reconstruct(scene_folder, tmp_path / "out", steps=120, seed=3, **SMALL)
    whole = reconstruct(scene_folder, tmp_path / "whole", steps=120, seed=3, **SMALL)
    assert whole["psnr"] == json.loads((tmp_path / "out/metrics.json").read_text())["psnr"]
    files = [(tmp_path / name / "point_cloud.ply").read_bytes() for name in ("out", "whole")]
    assert files[0] == files[1] and not (tmp_path / "out_partial.npz").exists()
