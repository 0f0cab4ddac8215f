"""Point warps: exact for the identity, the nearest surface wins, gradients are right."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from benchmarks.warp import numpy_warp
from see3d_jax.geometry.cameras import Camera, intrinsics_matrix, look_at, stack
from see3d_jax.geometry.point_warping import splat_points, warp_points

H, W = 24, 32
K = intrinsics_matrix(30, 30, W / 2, H / 2)
SOURCE = Camera(K, look_at((0, 0, 0), (0, 0, 3)), W, H)
TARGET = Camera(K, look_at((0.4, 0.1, 0.2), (0, 0, 3)), W, H)


def _picture() -> tuple[np.ndarray, np.ndarray]:
    """Random colours on a wall at 4 with a box at 2 before it."""
    rng = np.random.default_rng(0)
    depth = np.full((H, W), 4, np.float32)
    depth[8:16, 10:20] = 2
    return rng.random((H, W, 3)).astype(np.float32), depth


@pytest.mark.parametrize("warp", [warp_points, splat_points])
def test_identity_is_exact(warp):
    image, depth = _picture()
    warped = warp(image, depth, SOURCE, stack([SOURCE]))
    np.testing.assert_allclose(warped.image[0], image, atol=2e-4)
    np.testing.assert_allclose(warped.depth[0], depth, rtol=1e-4)
    assert np.asarray(warped.known).min() > 0.999


def test_the_fast_z_buffer_is_the_plain_one():
    image, depth = _picture()
    depth[0] = 0
    depth[1] = np.nan
    warped = warp_points(image, depth, SOURCE, stack([TARGET, TARGET]))
    colour, z, known = numpy_warp(image, np.nan_to_num(depth), SOURCE, TARGET)
    for view in range(2):
        ours = np.asarray(warped.known)[view].reshape(-1) > 0
        assert (ours != known).mean() < 0.005  # a rounding at a pixel border
        both = ours & known
        np.testing.assert_allclose(np.asarray(warped.depth)[view].reshape(-1)[both], z[both], 1e-3)
        same = np.abs(np.asarray(warped.image)[view].reshape(-1, 3) - colour).max(-1)[both] < 1e-6
        assert same.mean() > 0.99


def test_nothing_in_view_is_all_hole():
    image, depth = _picture()
    away = Camera(K, look_at((0, 0, 0), (0, 0, -3)), W, H)
    for warp in (warp_points, splat_points):
        warped = warp(image, depth, SOURCE, stack([away]))
        assert np.asarray(warped.known).sum() == 0 and np.all(np.isfinite(warped.image))


def test_splat_gradients_agree_with_differences():
    image, depth = _picture()
    goal = np.random.default_rng(1).random((H, W, 3))

    def loss(shift):
        warped = splat_points(image, depth + shift, SOURCE, stack([TARGET]))
        return ((warped.image[0] - goal) ** 2 * warped.known[0]).mean()

    gradient = float(jax.grad(loss)(0.0133))
    step = 2e-3
    difference = float(loss(0.0133 + step) - loss(0.0133 - step)) / (2 * step)
    assert np.isfinite(gradient) and abs(gradient - difference) < 0.2 * abs(difference) + 1e-3


def test_shapes_are_checked():
    image, depth = _picture()
    with pytest.raises(ValueError, match="expected an image"):
        warp_points(image[:-1], depth, SOURCE, stack([TARGET]))
    with pytest.raises(ValueError, match="batch"):
        splat_points(image, depth, SOURCE, TARGET)
