"""A scene of Gaussians → another file: other splat formats, or a triangle mesh.

Splats become .ply, .splat or .spz. A mesh (.obj, .glb, or .ply when asked for) is fused from the
depth that the scene shows to its cameras (`splatting.mesh`) and has one colour per vertex. It has
the scene's own coordinates, except in .glb, whose axes are by definition x right, y up, z back:
y and z change sign there, as in .spz.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from see3d_jax.errors import InputError, WorkError
from see3d_jax.files import atomic_path
from see3d_jax.geometry.cameras import Camera
from see3d_jax.geometry.scene_files import (
    PosedImages,
    read_inria_cameras,
    read_transforms,
    write_inria_cameras,
)
from see3d_jax.splatting.formats import FORMATS, read_gaussians, write_gaussians
from see3d_jax.splatting.gaussians import Gaussians
from see3d_jax.splatting.mesh import Mesh, mesh_of_gaussians

SCENE_FILE, CAMERAS_FILE = "point_cloud.ply", "cameras.json"
MESH_FORMATS = (".ply", ".obj", ".glb")
MIN_RESOLUTION, MAX_RESOLUTION = 16, 768


def export_scene(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    mesh: bool = False,
    cameras: str | os.PathLike[str] | None = None,
    resolution: int = 256,
) -> str:
    """Writes a scene as `output`, in the format of its suffix.

    Args:
      source: result folder of `see3d reconstruct` or `create`, or a .ply, .splat or .spz file.
      output: .ply, .splat, .spz (Gaussians) or .obj, .glb (mesh).
      mesh: makes a .ply hold the mesh, too.
      cameras: for a mesh: cameras.json or transforms.json to look from [default: the cameras.json
        beside the scene].
      resolution: for a mesh: voxels along the longest side, 16–768.

    Returns what was written, in words. Raises InputError for unusable input, before any work, and
    WorkError where the cameras see no surface.
    """
    output, suffix = Path(output), Path(output).suffix.lower()
    if suffix not in (*FORMATS, *MESH_FORMATS):
        raise InputError(f"{output}: --output must end in .ply, .splat, .spz, .obj or .glb")
    mesh = mesh or suffix not in FORMATS
    if mesh and suffix not in MESH_FORMATS:
        raise InputError(f"{output}: a mesh is written as .ply, .obj or .glb")
    if not MIN_RESOLUTION <= resolution <= MAX_RESOLUTION:
        raise InputError(
            f"resolution must be {MIN_RESOLUTION} to {MAX_RESOLUTION} voxels, got {resolution}"
        )
    scene = _scene_file(Path(source))
    gaussians = read_gaussians(scene)
    if not mesh:
        write_gaussians(output, gaussians)
        return f"{gaussians.count} Gaussians"
    _trimesh()
    made = _mesh(gaussians, _cameras(scene, cameras), resolution)
    write_mesh(output, made)
    return f"a mesh of {len(made.vertices)} vertices and {len(made.faces)} triangles"


def write_cameras(path: str | os.PathLike[str], cameras: Mapping[str, Camera]) -> None:
    """Writes the cameras of named views beside a scene, in the order of the names."""
    names = sorted(cameras)
    write_inria_cameras(path, PosedImages(tuple(names), tuple(cameras[name] for name in names)))


def write_mesh(path: str | os.PathLike[str], mesh: Mesh) -> None:
    """Writes .ply, .obj or .glb, as the name says, with a colour per vertex."""
    trimesh = _trimesh()
    vertices = mesh.vertices
    if Path(path).suffix.lower() == ".glb":
        vertices = vertices * np.float32([1, -1, -1])
    made = trimesh.Trimesh(vertices, mesh.faces, vertex_colors=mesh.colors, process=False)
    with atomic_path(path) as temporary:
        made.export(temporary)


def _mesh(gaussians: Gaussians, cameras: tuple[Camera, ...], resolution: int) -> Mesh:
    mesh = mesh_of_gaussians(gaussians, cameras, resolution)
    if mesh is None:
        raise WorkError(
            "the cameras see no surface of this scene; are they its cameras, and is it fitted?"
        )
    return mesh


def _scene_file(source: Path) -> Path:
    if source.is_dir():
        places = (source / SCENE_FILE, source / "gaussians" / SCENE_FILE)
        source = next((place for place in places if place.is_file()), places[0])
    if not source.exists():
        raise InputError(f"{source}: no such file")
    return source


def _cameras(scene: Path, given: str | os.PathLike[str] | None) -> tuple[Camera, ...]:
    path = scene.parent / CAMERAS_FILE if given is None else Path(given)
    if given is None and not path.is_file():
        raise InputError(
            f"{path}: no such file; a mesh needs the cameras that saw the scene: give --cameras "
            "a cameras.json or transforms.json"
        )
    if path.is_dir():
        raise InputError(f"{path}: is a folder; name the cameras.json or transforms.json in it")
    read = read_inria_cameras if path.name == CAMERAS_FILE else read_transforms
    return read(path).cameras


def _trimesh():
    try:
        import trimesh
    except ImportError:
        raise InputError("meshes are written with trimesh: pip install '.[mesh]'") from None
    return trimesh
