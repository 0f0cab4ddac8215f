"""Cameras find their way back: on a known scene at once, together with an unknown one in a fit."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from see3d_jax.geometry.cameras import Camera, intrinsics_matrix, look_at, stack
from see3d_jax.splatting.fit import FitConfig, TrainingViews, fit
from see3d_jax.splatting.gaussians import Gaussians, from_points
from see3d_jax.splatting.poses import alignment_step, carried_along, moved
from see3d_jax.splatting.render import render, render_within

SIZE = 64
EYES = [(-1.2, 0, -2.6), (-0.6, -0.5, -2.9), (0, 0.5, -3), (0.7, -0.3, -2.9), (1.2, 0.3, -2.6)]


def scene() -> Gaussians:
    """A hilly wall of small Gaussians with a smooth pattern, larger than any view."""
    x, y = (v.ravel() for v in np.meshgrid(np.linspace(-3.5, 3.5, 70), np.linspace(-3, 3, 60)))
    pattern = [np.sin(3 * x) * np.sin(2.5 * y), np.cos(2 * x + y), np.sin(4 * y - 1.5 * x)]
    points = np.stack([x, y, 0.5 * np.cos(2 * x) * np.cos(1.5 * y)], -1)
    return from_points(points, 0.5 + 0.45 * np.stack(pattern, -1), len(x), 0, opacity=0.9)


def cameras() -> Camera:
    intrinsics = intrinsics_matrix(60, 60, SIZE / 2, SIZE / 2)
    return stack([Camera(intrinsics, look_at(eye, (0, 0, 0)), SIZE, SIZE) for eye in EYES])


def off_by(true: np.ndarray, degrees: float, distance: float) -> np.ndarray:
    """Every pose moved in a random direction."""
    motion = np.random.default_rng(1).normal(size=(len(true), 2, 3))
    motion *= np.array([np.radians(degrees), distance])[:, None] / np.linalg.norm(
        motion, axis=-1, keepdims=True
    )
    return np.asarray(moved(jnp.asarray(true), jnp.asarray(motion.reshape(-1, 6), jnp.float32)))


def pose_errors(found: np.ndarray, true: np.ndarray) -> tuple[float, float]:
    """Largest error of rotation in degrees and of the centre in scene units."""
    turn = np.einsum("nij,nkj->nik", found[:, :3, :3], true[:, :3, :3])
    sine = np.linalg.norm(turn - np.swapaxes(turn, 1, 2), axis=(1, 2)) / np.sqrt(8)
    gap = [np.linalg.inv(a)[:3, 3] - np.linalg.inv(b)[:3, 3] for a, b in zip(found, true)]
    return float(np.degrees(np.arcsin(sine.max()))), float(np.linalg.norm(gap, axis=1).max())


def test_a_camera_off_by_two_degrees_comes_back_to_a_known_scene():
    known, batch = scene(), cameras()
    true = np.asarray(batch.world_to_camera)
    found = jnp.asarray(off_by(true, degrees=2.0, distance=0.06))

    @jax.jit
    def step(pose, intrinsics, truth):
        picture = render_within(known, Camera(intrinsics, pose, SIZE, SIZE), 1 << 15)
        maps = picture.rgb, picture.depth, picture.alpha
        return moved(pose, alignment_step(*maps, truth, None, intrinsics, 1))

    after = []
    for i in (1, 4):
        truth, pose = jnp.asarray(render(known, batch[i]).rgb), found[i]
        for _ in range(10):
            pose = step(pose, batch.intrinsics[i], truth)
        after.append(np.asarray(pose))
    degrees, distance = pose_errors(np.stack(after), true[[1, 4]])
    assert degrees < 0.1 and distance < 0.005, (degrees, distance)


def test_pixels_of_no_weight_do_not_pull_a_camera():
    known, camera = scene(), cameras()[2]
    picture = render(known, camera)
    truth = np.asarray(picture.rgb).copy()
    truth[:, :20] = 1.0
    weight = np.ones((SIZE, SIZE), np.float32)
    weight[:, :21] = 0.0
    maps = picture.rgb, picture.depth, picture.alpha, jnp.asarray(truth)
    masked, spoiled = (alignment_step(*maps, w, camera.intrinsics, 1) for w in (weight, None))
    assert np.abs(masked).max() < 1e-6 < np.abs(spoiled).max()


def test_perturbed_cameras_and_scene_are_found_together():
    known, batch = scene(), cameras()
    true = np.asarray(batch.world_to_camera)
    start = off_by(true, degrees=2.0, distance=0.06)
    images = [np.clip(np.asarray(render(known, batch[i]).rgb), 0, 1) for i in range(len(EYES))]
    views = TrainingViews(
        np.round(np.stack(images) * 255).astype(np.uint8),
        Camera(batch.intrinsics, start, SIZE, SIZE),
    )
    config = FitConfig(steps=200, refine_poses=True, means_rate=1e-4, relocate_until=0.0)
    result = fit(views, known, 3.0, config, progress=False)
    found = np.asarray(result.cameras.world_to_camera)
    before, after = (pose_errors(carried_along(p, p, true), true) for p in (start, found))
    assert after[0] < 0.5 * before[0] and after[1] < 0.5 * before[1], (before, after)


def test_a_motion_turns_and_shifts_the_cameras_own_axes():
    pose = cameras().world_to_camera[1]
    same = np.asarray(moved(pose, jnp.zeros(6)))
    np.testing.assert_allclose(same, pose, atol=1e-6)
    turned = np.asarray(moved(pose, jnp.array([0, 0, np.pi / 2, 0, 0, 1.0], jnp.float32)))
    quarter = np.array([[0, -1, 0], [1, 0, 0], [0, 0, 1]])
    np.testing.assert_allclose(turned[:3, :3], quarter @ pose[:3, :3], atol=1e-6)
    assert turned[2, 3] == pytest.approx(pose[2, 3] + 1)
