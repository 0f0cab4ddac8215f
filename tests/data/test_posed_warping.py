"""The warp of the input job against the one of the geometry package, and against exact views."""

from __future__ import annotations

import numpy as np
import pytest

from see3d_jax.data.warping import PosedView, Warper
from see3d_jax.geometry.cameras import Camera, intrinsics_matrix, look_at, pixel_grid, stack
from see3d_jax.geometry.warping import warp_views

SIZE = H, W = 48, 64
K = intrinsics_matrix(60, 60, W / 2, H / 2)
SOURCES = [look_at(eye, (0, 0, 3)) for eye in ((0, 0, 0), (0.3, -0.1, 0.1), (-0.4, 0.1, -0.2))]
TARGETS = [look_at(eye, (0.1, 0, 3)) for eye in ((0.1, 0, 0.4), (0.6, -0.3, -0.3))]


def render(pose: np.ndarray) -> PosedView:
    """A wall at z = 4 and a rectangle before it at z = 2, with smooth colours: exact view."""
    pixels = pixel_grid(H, W).astype(np.float64)
    rays = np.concatenate([(pixels - [W / 2, H / 2]) / 60, np.ones((H, W, 1))], -1)
    to_world = np.linalg.inv(pose.astype(np.float64))
    rays, origin = rays @ to_world[:3, :3].T, to_world[:3, 3]
    far, near = ((z - origin[2]) / rays[..., 2] for z in (4, 2))
    hit = origin + near[..., None] * rays
    depth = np.where((np.abs(hit[..., 0]) < 0.5) & (np.abs(hit[..., 1]) < 0.4), near, far)
    points = origin + depth[..., None] * rays
    phases = np.stack([2 * points[..., 0], 2 * points[..., 1], points.sum(-1)], -1)
    colour = np.round(255 * (0.5 + 0.4 * np.sin(2.5 * phases))).astype(np.uint8)
    return PosedView(colour, depth.astype(np.float32), K, pose)


@pytest.mark.parametrize("count", [1, 3])
def test_it_agrees_with_the_geometry_package(count):
    views = [render(pose) for pose in SOURCES[:count]]
    expected = warp_views(
        np.stack([view.image for view in views]).astype(np.float32),
        np.stack([view.depth for view in views]),
        stack([Camera(K, pose, W, H) for pose in SOURCES[:count]]),
        stack([Camera(K, pose, W, H) for pose in TARGETS]),
    )
    warp = Warper(views)
    for number, pose in enumerate(TARGETS):
        image, known = warp(K, pose, SIZE)
        known_there = np.asarray(expected.known[number, ..., 0]) > 0
        assert (known != known_there).mean() < 0.01
        both = known & known_there
        difference = np.abs(image - np.asarray(expected.image[number]))[both]
        assert np.median(difference) < 1.5 and np.quantile(difference, 0.99) < 12


def test_known_pixels_show_what_the_target_camera_sees():
    warp = Warper([render(pose) for pose in SOURCES])
    for pose in TARGETS:
        image, known = warp(K, pose, SIZE)
        truth = render(pose).image
        error = (image.astype(float) - truth)[known] / 255
        assert -10 * np.log10(np.mean(error**2)) > 38 and known.mean() > 0.7
        assert (image[~known] == 0).all()


def test_a_view_warped_to_itself_is_itself():
    view = render(SOURCES[1])
    image, known = Warper([view])(K, SOURCES[1], SIZE)
    np.testing.assert_array_equal(image[known], view.image[known])
    assert known.mean() > 0.84, "only the outline of the rectangle and its rim are dropped"


def test_unknown_depth_leaves_holes_and_nothing_else():
    view = render(SOURCES[0])
    depth = view.depth.copy()
    depth[:, :20] = 0
    depth[:, 20:24] = np.inf
    known = Warper([PosedView(view.image, depth, K, SOURCES[0])])(K, SOURCES[0], SIZE)[1]
    assert not known[:, :24].any() and known[:, 26:].mean() > 0.85
    blind = PosedView(view.image, np.zeros_like(depth), K, SOURCES[0])
    assert not Warper([blind])(K, SOURCES[0], SIZE)[1].any()


def test_what_lies_behind_the_target_camera_is_not_seen():
    away = look_at((0, 0, 6), (0, 0, 9))
    assert not Warper([render(SOURCES[0])])(K, away, SIZE)[1].any()
