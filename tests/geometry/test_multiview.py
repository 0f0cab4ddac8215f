"""Stereo without weights: right on textured surfaces, silent where nothing can be known."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from see3d_jax.geometry.cameras import Camera, intrinsics_matrix, look_at, pixel_grid, stack
from see3d_jax.geometry.multiview import _tidied, choose_sources, stereo_depth, sweep_range

H, W, FOCAL = 48, 64, 60
K = intrinsics_matrix(FOCAL, FOCAL, W / 2, H / 2)
TEXTURE = cv2.GaussianBlur(np.random.default_rng(0).random((512, 512, 3), np.float32), (0, 0), 1.5)
TEXTURE = (TEXTURE - TEXTURE.min()) / (TEXTURE.max() - TEXTURE.min())


def _camera(x: float) -> Camera:
    return Camera(K, look_at((x, 0, 0), (x, 0, 1)), W, H)


def _render(camera: Camera) -> tuple[np.ndarray, np.ndarray]:
    """A textured wall at z = 4 with a textured board at z = 2.5 before it."""
    eye = np.asarray(camera.position)
    rays = (pixel_grid(H, W) - [W / 2, H / 2]) / FOCAL
    near = eye[:2] + 2.5 * rays
    board = (np.abs(near[..., 0]) < 0.6) & (np.abs(near[..., 1]) < 0.5)
    depth = np.where(board, 2.5, 4.0).astype(np.float32)
    place = (eye[:2] + depth[..., None] * rays) * 24 + 256 + np.where(board, 97, 0)[..., None]
    place = place.astype(np.float32)
    return cv2.remap(TEXTURE, place[..., 0], place[..., 1], cv2.INTER_LINEAR), depth


def test_depth_of_three_views_of_a_board_before_a_wall():
    cameras = [_camera(x) for x in (-0.3, 0.0, 0.3)]
    images, truths = zip(*(_render(camera) for camera in cameras), strict=True)
    found = stereo_depth(np.stack(images), stack(cameras), planes=48)
    known = found[1] > 0
    error = np.abs(found[1] / truths[1] - 1)[known]
    assert known.mean() > 0.7
    assert np.median(error) < 0.02 and (error > 0.1).mean() < 0.08


def test_other_exposure_changes_little():
    cameras = [_camera(x) for x in (-0.3, 0.0)]
    images, truths = zip(*(_render(camera) for camera in cameras), strict=True)
    darker = np.stack([images[0], 0.6 * images[1] + 0.05])
    found = stereo_depth(darker, stack(cameras), planes=48)[0]
    assert np.median(np.abs(found / truths[0] - 1)[found > 0]) < 0.025


def test_views_that_look_away_say_nothing():
    away = Camera(K, look_at((0, 0, 0), (0, 0, -1)), W, H)
    cameras = stack([_camera(0.0), away])
    assert choose_sources(cameras) == [[], []]
    images = np.stack([_render(_camera(0.0))[0]] * 2)
    assert not stereo_depth(images, cameras, planes=48).any()


def test_unusable_input_is_named():
    cameras = stack([_camera(0.0), _camera(0.2)])
    with pytest.raises(ValueError, match="V ≥ 2"):
        stereo_depth(np.zeros((1, H, W, 3)), cameras[:1])
    with pytest.raises(ValueError, match="less than far"):
        sweep_range(cameras, 0, [1], (3.0, 2.0))


def test_cameras_that_turn_to_a_point_are_swept_around_it():
    """Far apart and turned inward, disparity against infinity exceeds the picture many times."""
    for distance in (2.0, 5.0):
        eyes = [(distance * np.sin(a), 0, -distance * np.cos(a)) for a in (-0.3, 0.3)]
        cameras = stack([Camera(K, look_at(eye, (0, 0, 0)), W, H) for eye in eyes])
        swept = sweep_range(cameras, 0, [1])
        assert swept.low < 1 / distance < 0.9 * swept.high
    assert sweep_range(cameras, 0, [1], (2.0, 4.0)).low == 0.25


def test_specks_go_and_pinholes_are_filled():
    depth = np.zeros((1, 20, 20), np.float32)
    depth[0, 4:16, 4:16] = 2.0
    depth[0, 8, 8] = 0.0
    depth[0, 0, 18] = 3.0
    tidied = np.asarray(_tidied(depth))[0]
    assert tidied[8, 8] == 2.0 and tidied[0, 18] == 0.0
    assert (tidied[6:14, 6:14] == 2.0).all() and (tidied > 0).sum() <= 144
