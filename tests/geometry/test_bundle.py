"""Cameras and points that agree with what was seen, also where some of it is wrong."""

from __future__ import annotations

import numpy as np
import pytest

from see3d_jax.geometry.bundle import Tracks, adjust
from see3d_jax.geometry.cameras import intrinsics_matrix, look_at
from see3d_jax.splatting.poses import carried_along

VIEWS, POINTS, SIZE = 8, 150, 4.0


def turned_by(vector: np.ndarray) -> np.ndarray:
    angle = np.linalg.norm(vector)
    x, y, z = vector / angle
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross


def off_by(poses: np.ndarray, degrees: float, distance: float) -> np.ndarray:
    """Every camera turned and shifted in random directions of its own axes."""
    rng, result = np.random.default_rng(3), poses.copy()
    for pose in result:
        turn, shift = (v / np.linalg.norm(v) for v in rng.normal(size=(2, 3)))
        pose[:3] = turned_by(np.radians(degrees) * turn) @ pose[:3]
        pose[:3, 3] += distance * shift
    return result


def centres(poses: np.ndarray) -> np.ndarray:
    return -np.einsum("vji,vj->vi", poses[:, :3, :3], poses[:, :3, 3])


def errors(found: np.ndarray, true: np.ndarray) -> tuple[float, float]:
    """Largest error in degrees and of the centre; where the world is does not count."""
    found = carried_along(found, found, true)
    gap = np.linalg.norm(found[:, :3, :3] - true[:, :3, :3], axis=(1, 2)) / np.sqrt(8)
    shift = np.linalg.norm(centres(found) - centres(true), axis=1)
    return float(np.degrees(2 * np.arcsin(gap.max()))), float(shift.max())


@pytest.fixture(scope="module")
def problem() -> tuple[np.ndarray, np.ndarray, Tracks]:
    """Intrinsics, true poses, and sightings to 0.3 pixels, every tenth of them wrong."""
    rng = np.random.default_rng(0)
    points = rng.uniform(-1, 1, (POINTS, 3))
    angles = np.linspace(-0.7, 0.7, VIEWS)
    eyes = [(4 * np.sin(a), 0.4 * np.cos(7 * a), -4 * np.cos(a)) for a in angles]
    poses = np.stack([look_at(eye, (0, 0, 0)) for eye in eyes]).astype(np.float64)
    intrinsics = np.tile(intrinsics_matrix(300, 310, 160, 120), (VIEWS, 1, 1)).astype(np.float64)
    views, ids = (v.ravel() for v in np.meshgrid(np.arange(VIEWS), np.arange(POINTS)))
    local = np.einsum("mij,mj->mi", poses[views, :3, :3], points[ids]) + poses[views, :3, 3]
    pixels = np.einsum("mij,mj->mi", intrinsics[views], local / local[:, 2:])[:, :2]
    pixels += rng.normal(scale=0.3, size=pixels.shape)
    wrong = rng.random(len(pixels)) < 0.1
    pixels[wrong] += rng.uniform(-40, 40, (wrong.sum(), 2))
    return intrinsics, poses, Tracks(views, ids, pixels)


def test_cameras_come_back_and_the_world_stays_where_the_given_ones_say(problem):
    intrinsics, true, tracks = problem
    start = off_by(true, 2.0, 0.02 * SIZE)
    found = adjust(intrinsics, start, tracks, SIZE)
    assert found.before > 2 and found.after < 0.5
    degrees, distance = errors(found.poses, true)
    assert degrees < 0.2 and distance < 0.003 * SIZE, (degrees, distance)
    # Nothing but the given cameras says how large the world is and how it is turned.
    assert np.ptp(centres(found.poses)[:, 0]) == pytest.approx(
        np.ptp(centres(true)[:, 0]), rel=0.05
    )
    assert np.abs(centres(found.poses) - centres(true)).max() < 0.04 * SIZE


def test_right_cameras_do_not_agree_better_after_adjustment(problem):
    intrinsics, true, tracks = problem
    found = adjust(intrinsics, true, tracks, SIZE)
    assert 0.9 * found.before < found.after < 1.1 * found.before


def test_only_free_cameras_move_and_one_that_sees_nothing_stays(problem):
    intrinsics, true, tracks = problem
    start = true.copy()
    start[[2, 5]] = off_by(true[[2, 5]], 2.0, 0.02 * SIZE)
    seen = tracks.views != 5
    tracks = Tracks(*(values[seen] for values in (tracks.views, tracks.points, tracks.pixels)))
    free = np.isin(np.arange(VIEWS), [2, 5])
    found = adjust(intrinsics, start, tracks, SIZE, free).poses
    np.testing.assert_array_equal(found[~free], true[~free])
    np.testing.assert_allclose(found[5], start[5], atol=1e-6)
    assert np.abs(found[2] - true[2]).max() < 5e-3 < np.abs(start[2] - true[2]).max()


def test_as_many_unknowns_as_sightings_say_nothing(problem):
    intrinsics, true, tracks = problem
    few = (tracks.points < 12) & (tracks.views < 2)
    tracks = Tracks(*(values[few] for values in (tracks.views, tracks.points, tracks.pixels)))
    assert adjust(intrinsics[:2], true[:2], tracks, SIZE).after == np.inf
