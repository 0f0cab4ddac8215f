"""Relocation keeps the spread, growth stays inside the capacity, seeds find the surface."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from see3d_jax.geometry.cameras import Camera, intrinsics_matrix, look_at
from see3d_jax.splatting import seeds
from see3d_jax.splatting.densify import DEAD_OPACITY, Crowding, relocate
from see3d_jax.splatting.gaussians import EMPTY_LOGIT, Gaussians, from_points, occupied
from see3d_jax.splatting.projection import rotation_columns
from see3d_jax.splatting.render import render

CAMERA = Camera(intrinsics_matrix(60, 60, 32, 32), look_at((0, 0, -3), (0, 0, 0)), 64, 64)
EVEN = Crowding(jnp.ones(50), jnp.ones(50))


def test_growth_puts_faded_gaussians_to_work_and_clears_the_moments_of_the_split():
    rng = np.random.default_rng(0)
    points, colors = rng.normal(0, 0.5, (20, 3)), rng.uniform(size=(20, 3))
    scene = from_points(points, colors, capacity=50, sh_degree=0, opacity=0.6)
    logits = np.array(scene.opacity_logits)
    logits[15:20] = -8.0  # faded, but not empty
    scene = Gaussians(scene.means, scene.log_scales + 1, scene.quaternions, logits, scene.sh)
    moments = jax.tree.map(jnp.ones_like, scene)
    grown, cleared, count = jax.jit(relocate)(scene, moments, EVEN, jax.random.key(1), 30)
    assert int(count) == 30 == occupied(grown).count
    alive = np.asarray(jax.nn.sigmoid(grown.opacity_logits)) > DEAD_OPACITY
    assert alive.sum() == 30  # the faded ones were put to work
    np.testing.assert_array_equal(np.asarray(grown.opacity_logits)[alive], logits[0])
    before, after = (np.asarray(render(s, CAMERA).rgb) for s in (scene, grown))
    assert np.abs(before - after).mean() < 0.15 and before.mean() > 0.4
    assert len(np.unique(grown.means[np.asarray(alive)], axis=0)) == 30  # no two at one place
    untouched = np.asarray(cleared.opacity_logits) == 1
    np.testing.assert_array_equal(grown.means[untouched], scene.means[untouched])
    assert 0 < untouched.sum() < 50 and (np.asarray(cleared.means)[~untouched] == 0).all()
    full, _, count = jax.jit(relocate)(grown, cleared, EVEN, jax.random.key(2), 50)
    assert int(count) == 50 and full.count == 50
    same, _, count = jax.jit(relocate)(full, cleared, EVEN, jax.random.key(3), 30)
    assert int(count) == 50  # nothing is given up for a target below
    jax.tree.map(np.testing.assert_array_equal, same, full)


def test_copies_go_to_the_opaque_that_are_pulled_across_the_image():
    opacity, pull = np.float32([0.9, 0.9, 0.1, 0.6]), np.float32([0.0, 1.0, 3.0, 2.0])
    scene = from_points(np.eye(4, 3) * 100, np.ones((4, 3)), 4004, 0)
    logits = np.array(scene.opacity_logits)
    logits[:4] = np.log(opacity / (1 - opacity))
    small = np.full((4004, 3), -6.0, np.float32)
    scene = dataclasses.replace(scene, opacity_logits=logits, log_scales=small)
    shown = np.float32([1, 2, 4, 8])  # what counts is the mean over the views
    crowding = Crowding(jnp.zeros(4004).at[:4].set(pull * shown), jnp.zeros(4004).at[:4].set(shown))
    grown, _, _ = relocate(scene, (), crowding, jax.random.key(0), 4004)
    expected = opacity * np.sqrt(pull) / (opacity * np.sqrt(pull)).sum()
    near = np.linalg.norm(np.asarray(grown.means)[4:, None] - scene.means[:4], axis=-1).argmin(1)
    np.testing.assert_allclose(np.bincount(near, minlength=4) / 4000, expected, atol=0.03)


def test_the_parts_of_a_gaussian_are_spread_as_it_was():
    scene = from_points(np.ones((1, 3)), np.ones((1, 3)), 4000, 0, opacity=0.6)
    scales = np.log(np.full((4000, 3), (0.1, 0.2, 0.4), np.float32))
    turned = np.full((4000, 4), (0.9, 0.1, 0.3, -0.2), np.float32)
    scene = dataclasses.replace(scene, log_scales=scales, quaternions=turned)
    parts, _, _ = relocate(scene, (), Crowding.none(4000), jax.random.key(0), 4000)
    np.testing.assert_allclose(parts.log_scales, scales - np.log(1.6), rtol=1e-5)
    axes = np.asarray(rotation_columns(jnp.asarray(turned[:1])))[..., 0]
    before = axes @ np.diag((0.1, 0.2, 0.4)) ** 2 @ axes.T
    after = np.cov(np.asarray(parts.means).T) + before / 1.6**2
    assert np.abs(after - before).max() < 0.05 * before.max()


def test_nothing_alive_is_left_alone():
    scene = from_points(np.zeros((1, 3)), np.ones((1, 3)), 8, 0, opacity=0.001)
    same, _, count = jax.jit(relocate)(scene, (), Crowding.none(8), jax.random.key(0), 2)
    assert int(count) == 1
    np.testing.assert_array_equal(same.opacity_logits, scene.opacity_logits)
    assert (np.asarray(same.opacity_logits)[1:] == EMPTY_LOGIT).all()


def textured_wall() -> tuple[list[np.ndarray], list[Camera]]:
    """The plane z = 0 with a smooth pattern, seen by five cameras in a row."""
    cameras = [
        Camera(CAMERA.intrinsics, look_at((x, 0, -3), (x * 0.3, 0, 0)), 64, 64)
        for x in (-0.6, -0.3, 0.0, 0.3, 0.6)
    ]
    images = []
    for camera in cameras:
        x, y = np.meshgrid(np.arange(64) + 0.5, np.arange(64) + 0.5)
        near, far = (seeds._lift(camera, x, y, np.full_like(x, d)) for d in (1.0, 2.0))
        step = -near[..., 2] / (far - near)[..., 2]
        u, v = np.moveaxis((near + step[..., None] * (far - near))[..., :2], -1, 0)
        pattern = [np.sin(5 * u) * np.sin(4 * v), np.cos(3 * u + v), np.sin(7 * v - 2 * u)]
        images.append(np.round(127.5 * (1 + np.stack(pattern, -1))).astype(np.uint8))
    return images, cameras


def test_starting_points_from_photos_lie_on_the_surface():
    images, cameras = textured_wall()
    xyz, rgb = seeds.from_photos(images, cameras, 400, np.random.default_rng(0))
    assert xyz.shape == rgb.shape == (400, 3) and 0 <= rgb.min() <= rgb.max() <= 1
    # depths of 0.9 … 12 were possible; the wall is at 3 and level spacing there is about 0.13
    assert np.median(np.abs(xyz[:, 2])) < 0.15


def test_starting_points_from_depth_are_exact():
    images, cameras = textured_wall()
    depth = np.full((64, 64), 3.0)
    depth[:, :40] = 0  # unknown
    rng = np.random.default_rng(0)
    points = seeds.from_depth_maps(images[2:3], [depth], cameras[2:3], 50, rng)
    np.testing.assert_allclose(points[0][:, 2], 0, atol=1e-5)


def test_gaps_are_filled_where_the_photos_agree_or_else_at_the_depth_of_the_neighbours():
    images, cameras = textured_wall()
    rng = np.random.default_rng(0)
    # Points behind the wall, on the right of the middle view; the wall itself has none.
    x, y = rng.uniform(44, 64, 50), rng.uniform(0, 64, 50)
    behind = seeds._lift(cameras[2], x, y, np.full(50, 4.5))
    points = behind, np.full((50, 3), 0.5)
    filled, colors = seeds.fill_gaps(points, images, cameras, 150, rng)
    assert filled.shape == colors.shape == (len(filled), 3) and 100 < len(filled) - 50 <= 150
    assert np.median(np.abs(filled[50:, 2])) < 0.15
    bare = [np.full_like(image, 200) for image in images]
    filled, _ = seeds.fill_gaps(points, bare, cameras, 150, rng)
    assert np.median(np.abs(filled[50:, 2] - 1.5)) < 0.5  # 4.5 along the axes of five cameras


def test_depth_range_survives_parallel_cameras():
    cameras = [
        Camera(CAMERA.intrinsics, look_at((x, 0, 0), (x, 0, 1)), 64, 64) for x in (0.0, 1.0, 2.0)
    ]
    near, far = seeds.depth_range(cameras)
    assert 0 < near < far < np.inf
    assert seeds.depth_range(cameras, np.array([[0.0, 0, 5], [1, 0, 7]])) == pytest.approx(
        (5, 7), rel=0.05
    )
