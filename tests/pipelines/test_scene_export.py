"""`see3d export`: what other programs read of the files, and one clear line for what is wrong."""

from __future__ import annotations

import numpy as np
import pytest
import trimesh
from click.testing import CliRunner

from see3d_jax import cli
from see3d_jax.errors import InputError, WorkError
from see3d_jax.geometry.scene_files import PosedImages, write_transforms
from see3d_jax.pipelines.scene_export import export_scene, write_cameras
from see3d_jax.splatting.formats import read_gaussians, write_ply
from see3d_jax.splatting.gaussians import from_points
from tests.splatting.test_mesh import RADIUS, ring


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A red and green ball, as a result folder of `see3d reconstruct` with its cameras."""
    path = tmp_path_factory.mktemp("scene")
    points = np.random.default_rng(0).normal(size=(2000, 3))
    points *= RADIUS / np.linalg.norm(points, axis=1, keepdims=True)
    colors = np.where(points[:, :1] > 0, (0.9, 0.1, 0.1), (0.1, 0.9, 0.1))
    write_ply(path / "point_cloud.ply", from_points(points, colors, 2000, 1, opacity=0.95))
    cameras = tuple(ring(6))
    images = PosedImages(tuple(f"{i}.png" for i in range(6)), cameras)
    write_cameras(path / "cameras.json", dict(zip(images.files, cameras)))
    write_transforms(path / "transforms.json", images)
    return path


@pytest.mark.parametrize("suffix", [".splat", ".spz", ".ply"])
def test_gaussians_go_from_format_to_format(folder, tmp_path, suffix):
    words = export_scene(folder, tmp_path / f"scene{suffix}")
    assert words == "2000 Gaussians"
    export_scene(tmp_path / f"scene{suffix}", tmp_path / "back.ply")
    before = read_gaussians(folder / "point_cloud.ply")
    after = read_gaussians(tmp_path / "back.ply")
    np.testing.assert_allclose(np.sort(after.means, 0), np.sort(before.means, 0), atol=1e-5)


@pytest.mark.parametrize("suffix", [".ply", ".obj", ".glb"])
def test_a_mesh_opens_elsewhere_with_its_shape_and_colours(folder, tmp_path, suffix):
    path = tmp_path / f"mesh{suffix}"
    result = CliRunner().invoke(
        cli.app,
        ["export", str(folder), "--output", str(path), "--mesh", "--resolution", "32"],
        catch_exceptions=False,
    )
    assert result.exit_code == 0 and "triangles" in result.output
    mesh = trimesh.load(path, force="mesh", process=False)
    vertices = mesh.vertices * ([1, -1, -1] if suffix == ".glb" else 1)
    assert abs(np.median(np.linalg.norm(vertices, axis=1)) - RADIUS) < 0.12
    colors = mesh.visual.vertex_colors[:, :3].astype(int)
    red, green = vertices[:, 0] > 0.3, vertices[:, 0] < -0.3
    assert np.median(colors[red], 0)[0] > 180 > 80 > np.median(colors[red], 0)[1]
    assert np.median(colors[green], 0)[1] > 180 > 80 > np.median(colors[green], 0)[0]
    assert mesh.volume > 0  # faces look outward, in every format's handedness


def test_cameras_may_come_from_another_file(folder, tmp_path):
    words = export_scene(
        folder / "point_cloud.ply", tmp_path / "mesh.glb",
        cameras=folder / "transforms.json", resolution=24,
    )  # fmt: skip
    assert "triangles" in words


@pytest.mark.parametrize(
    "output, options, message",
    [
        ("scene.las", {}, "must end in"),
        ("scene.spz", {"mesh": True}, "a mesh is written as"),
        ("mesh.glb", {"resolution": 4}, "resolution must be 16"),
        ("mesh.glb", {"cameras": "nowhere.json"}, "nowhere.json"),
        ("mesh.glb", {"cameras": "."}, "is a folder"),
    ],
)
def test_what_cannot_be_done_is_said_before_any_work(folder, tmp_path, output, options, message):
    with pytest.raises(InputError, match=message):
        export_scene(folder, tmp_path / output, **options)
    assert not list(tmp_path.iterdir())


def test_a_scene_without_cameras_or_surface_is_named(folder, tmp_path):
    lonely = tmp_path / "in"
    export_scene(folder, lonely / "scene.ply")
    with pytest.raises(InputError, match=r"cameras\.json: no such file; a mesh needs"):
        export_scene(lonely / "scene.ply", tmp_path / "mesh.glb")
    far = from_points(np.full((2, 3), 1e3), np.ones((2, 3)), 2)
    write_ply(lonely / "far.ply", far)
    with pytest.raises(WorkError, match="no surface"):
        export_scene(lonely / "far.ply", tmp_path / "mesh.glb", cameras=folder / "cameras.json")
    with pytest.raises(InputError, match="no such file"):
        export_scene(tmp_path / "absent", tmp_path / "mesh.glb")
    assert not (tmp_path / "mesh.glb").exists()
