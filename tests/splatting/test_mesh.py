"""Fused meshes lie on the surface that the depth maps show, face the cameras, keep its colours."""

from __future__ import annotations

import numpy as np
import pytest

from see3d_jax.geometry.cameras import Camera, intrinsics_matrix, look_at, pixel_grid
from see3d_jax.splatting.gaussians import from_points
from see3d_jax.splatting.mesh import Mesh, fuse, mesh_of_gaussians

SIZE, RADIUS = 64, 0.8


def ring(number: int = 8) -> list[Camera]:
    k = intrinsics_matrix(70, 70, SIZE / 2, SIZE / 2)
    angles = np.arange(number) * 2 * np.pi / number
    eyes = [(3 * np.sin(a), (-1) ** i * 1.2, -3 * np.cos(a)) for i, a in enumerate(angles)]
    return [Camera(k, look_at(eye, (0, 0, 0)), SIZE, SIZE) for eye in eyes]


def sphere_seen_by(camera: Camera) -> tuple[np.ndarray, np.ndarray]:
    """Exact depth and colour: red where x > 0, blue elsewhere."""
    k, pose = (np.asarray(x, np.float64) for x in (camera.intrinsics, camera.world_to_camera))
    pixels = (pixel_grid(SIZE, SIZE) - k[:2, 2]) / k[0, 0]
    rays = np.concatenate([pixels, np.ones((SIZE, SIZE, 1))], -1) @ pose[:3, :3]
    centre = -pose[:3, :3].T @ pose[:3, 3]
    a, b = (rays**2).sum(-1), (rays * centre).sum(-1)
    inside = b * b - a * (centre @ centre - RADIUS**2)
    depth = np.where(inside > 0, (-b - np.sqrt(np.maximum(inside, 0))) / a, 0)
    points = centre + depth[..., None] * rays
    return depth, np.where(points[..., :1] > 0, (1.0, 0, 0), (0, 0, 1.0))


@pytest.fixture(scope="module")
def sphere() -> Mesh:
    cameras = ring()
    return fuse(*zip(*map(sphere_seen_by, cameras)), cameras, 48)


def test_vertices_lie_on_the_sphere(sphere):
    radius = np.linalg.norm(sphere.vertices, axis=1)
    voxel = 2 * RADIUS / 48
    assert len(sphere.vertices) > 3000
    assert np.abs(radius - RADIUS).mean() < 0.35 * voxel
    assert np.abs(radius - RADIUS).max() < 2 * voxel
    x, y, z = sphere.vertices.T
    for side in (x > 0.5, x < -0.5, z > 0.5, z < -0.5, y > 0.5, y < -0.5):
        assert side.sum() > 100  # seen from all around


def test_faces_look_outward_and_vertices_have_their_colour(sphere):
    corners = sphere.vertices[sphere.faces]
    normal = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    assert ((normal * corners.mean(1)).sum(1) > 0).mean() > 0.999
    red = sphere.vertices[:, 0] > 0.2
    blue = sphere.vertices[:, 0] < -0.2
    assert np.abs(sphere.colors[red].astype(int) - (255, 0, 0)).max() < 30
    assert np.abs(sphere.colors[blue].astype(int) - (0, 0, 255)).max() < 30


def test_what_no_camera_sees_stays_open():
    (camera,) = ring(1)
    depth, image = sphere_seen_by(camera)
    mesh = fuse([depth], [image], [camera], 48)
    distance = np.linalg.norm(mesh.vertices - np.asarray(camera.position), axis=1)
    horizon = np.sqrt(np.linalg.norm(np.asarray(camera.position)) ** 2 - RADIUS**2)
    assert distance.max() < horizon + 0.1  # nothing was closed behind
    assert np.abs(np.linalg.norm(mesh.vertices, axis=1) - RADIUS).max() < 4 * 2 * RADIUS / 48


def test_a_loose_crumb_is_dropped_and_nothing_seen_is_no_mesh():
    cameras = ring()
    depths, images = zip(*map(sphere_seen_by, cameras))
    depths = [d.copy() for d in depths]
    depths[0][2:4, 2:4] = 2.0
    mesh = fuse(depths, images, cameras, 48)
    assert np.abs(np.linalg.norm(mesh.vertices, axis=1) - RADIUS).max() < 0.1
    assert fuse([np.zeros((SIZE, SIZE))], [images[0]], cameras[:1], 48) is None


def test_a_scene_of_gaussians_becomes_a_mesh_where_they_are():
    rng = np.random.default_rng(0)
    points = rng.normal(size=(4000, 3))
    points *= RADIUS / np.linalg.norm(points, axis=1, keepdims=True)
    scene = from_points(points, np.full((4000, 3), 0.7), 4000, 0, opacity=0.95)
    mesh = mesh_of_gaussians(scene, ring(), 40)
    radius = np.linalg.norm(mesh.vertices, axis=1)
    # Their mean depth lies half a width in front of their centres.
    assert np.abs(np.median(radius) - RADIUS) < 0.08
    assert np.percentile(np.abs(radius - RADIUS), 95) < 0.12
    assert np.abs(np.median(mesh.colors) - 0.7 * 255) < 8
