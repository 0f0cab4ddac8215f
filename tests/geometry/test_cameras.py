"""Cameras: projection and its inverse, conventions, resizing."""

from __future__ import annotations

import numpy as np
import pytest

from see3d_jax.geometry.cameras import (
    Camera,
    intrinsics_matrix,
    look_at,
    pixel_grid,
    project,
    rigid_inverse,
    stack,
    unproject,
)


def _random_cameras(count: int, seed: int = 0) -> Camera:
    rng = np.random.default_rng(seed)
    cameras = []
    for _ in range(count):
        matrix = look_at(rng.normal(size=3) * 3, rng.normal(size=3) * 0.3)
        fx, fy = rng.uniform(20, 60, 2)
        cx, cy = rng.uniform(10, 20, 2)
        cameras.append(Camera(intrinsics_matrix(fx, fy, cx, cy), matrix, 32, 24))
    return stack(cameras)


def test_project_undoes_unproject():
    cameras = _random_cameras(8)
    pixels = np.broadcast_to(pixel_grid(24, 32).reshape(1, -1, 2), (8, 24 * 32, 2))
    depth = np.random.default_rng(1).uniform(0.5, 20, (8, 24 * 32)).astype(np.float32)
    back, z = project(cameras, unproject(cameras, pixels, depth))
    np.testing.assert_allclose(back, pixels, atol=2e-3)  # float32, at up to 20 units
    np.testing.assert_allclose(z, depth, rtol=1e-5, atol=1e-5)


def test_rigid_inverse_composes_to_identity():
    matrix = _random_cameras(5).world_to_camera
    product = np.asarray(rigid_inverse(matrix)) @ matrix
    np.testing.assert_allclose(product, np.broadcast_to(np.eye(4), (5, 4, 4)), atol=1e-5)


def test_axes_are_opencv_and_pixel_centres_are_at_one_half():
    camera = Camera(intrinsics_matrix(10, 10, 4, 3), np.eye(4, dtype=np.float32), 8, 6)
    points = np.array([[0.0, 0, 2], [1, 0, 2], [0, 1, 2]], np.float32)  # ahead, right, down
    pixels, depth = project(camera, points)
    np.testing.assert_allclose(pixels, [[4, 3], [9, 3], [4, 8]], atol=1e-5)
    np.testing.assert_allclose(depth, 2)
    assert pixel_grid(6, 8)[0, 0].tolist() == [0.5, 0.5]


def test_look_at_sees_the_target_in_the_middle_and_up_upward():
    camera = Camera(intrinsics_matrix(10, 10, 4, 3), look_at((1, -2, -5), (0, 0, 0)), 8, 6)
    pixels, _ = project(camera, np.array([[0, 0, 0], [0, -0.5, 0]], np.float32))
    np.testing.assert_allclose(pixels[0], [4, 3], atol=1e-5)
    assert pixels[1, 1] < 3  # world −y is up, so it is higher in the image
    np.testing.assert_allclose(camera.position, [1, -2, -5], atol=1e-5)
    with pytest.raises(ValueError, match="parallel to `up`"):
        look_at((0, -1, 0), (0, 0, 0))


def test_resized_camera_sees_the_same_ray_at_the_same_place():
    camera = _random_cameras(1)[0]
    points = np.random.default_rng(2).normal(size=(20, 3)).astype(np.float32)
    before, _ = project(camera, points)
    after, _ = project(camera.resized(64, 12), points)
    np.testing.assert_allclose(after, before * np.array([2.0, 0.5]), rtol=1e-4, atol=1e-3)


def test_stack_refuses_mixed_sizes():
    camera = _random_cameras(1)[0]
    with pytest.raises(ValueError, match="one image size"):
        stack([camera, camera.resized(10, 10)])
