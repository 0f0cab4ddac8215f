"""The picture of the cameras shows every camera, in its colour, at its place."""

from __future__ import annotations

import numpy as np

from see3d_jax.geometry.cameras import Camera, intrinsics_matrix, look_at
from see3d_jax.pipelines.camera_plot import plot_cameras, scene_points
from see3d_jax.pipelines.warps import View

K = intrinsics_matrix(40, 40, 24, 16)


def _cameras(*eyes) -> list[Camera]:
    return [Camera(K, look_at(eye, (0, 0, 4)), 48, 32) for eye in eyes]


def _share(picture: np.ndarray, channel: int) -> np.ndarray:
    """Where one channel stands out clearly over both others."""
    rest = np.delete(picture.astype(int), channel, -1).max(-1)
    return picture[..., channel].astype(int) - rest > 60


def test_given_cameras_are_red_and_new_ones_blue_and_points_keep_their_colour() -> None:
    depth = np.full((32, 48), 4.0, np.float32)
    depth[:4] = 0
    green = np.zeros((32, 48, 3), np.uint8) + np.array([0, 255, 0], np.uint8)
    given, new = _cameras((0, 0, 0)), _cameras((-2, 0, 0), (2, 0, 0))
    points, colours = scene_points([View(green, depth, given[0])])
    assert len(points) == 28 * 48 and np.allclose(points[:, 2], 4, atol=1e-5)
    picture = plot_cameras(given, new, points, colours)
    assert picture.shape == (640, 1280, 3)
    for half in (picture[:, :640], picture[:, 640:]):
        red, green_there, blue = (_share(half, channel) for channel in range(3))
        assert red.any() and blue.any() and green_there.sum() > 300
        # The given camera stands between the two new ones.
        columns = [np.flatnonzero(part.any(0)) for part in (red, blue)]
        assert columns[1].min() < columns[0].min() and columns[0].max() < columns[1].max()


def test_it_needs_no_points_and_survives_cameras_at_one_place() -> None:
    here = _cameras((0, 0, 0))
    empty = np.zeros((0, 3)), np.zeros((0, 3), np.uint8)
    assert _share(plot_cameras(here, here, *empty), 2).any()
    down = [Camera(K, look_at((0, 0, 0), (0, 1, 0), (0, 0, 1)), 48, 32)]
    assert np.isfinite(plot_cameras(down, down, *empty)).all()
