"""Cameras that are nearly right get better by what photos share; right ones stay to the bit."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from scipy.ndimage import map_coordinates
from skimage import data

from see3d_jax.geometry.bundle import Tracks
from see3d_jax.geometry.cameras import Camera, intrinsics_matrix, look_at, pixel_grid
from see3d_jax.pipelines.matching import Matches
from see3d_jax.pipelines.refine_cameras import follow, longest, neighbours, refine_cameras
from tests.geometry.test_bundle import errors, off_by

WIDTH, HEIGHT, VIEWS, SIZE = 160, 120, 7, 3.0
HELD_OUT = np.arange(VIEWS) == 3


def wall(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return 0.4 * np.cos(2.5 * x) * np.cos(2 * y)


def photo(camera: Camera) -> np.ndarray:
    """A hilly wall with a picture on it, by following every ray to it."""
    xy = (pixel_grid(HEIGHT, WIDTH) - camera.intrinsics[:2, 2]) / camera.intrinsics[0, 0]
    pose = camera.world_to_camera.astype(np.float64)
    ray = np.append(xy, np.ones((HEIGHT, WIDTH, 1)), -1) @ pose[:3, :3]
    eye = -pose[:3, :3].T @ pose[:3, 3]
    far = -eye[2] / ray[..., 2]
    for _ in range(40):
        at = eye + far[..., None] * ray
        far += 0.5 * (wall(at[..., 0], at[..., 1]) - at[..., 2]) / ray[..., 2]
    at = eye + far[..., None] * ray
    picture = data.astronaut()
    where = np.stack([at[..., 1], at[..., 0]]) * 90 + 256
    shown = [map_coordinates(picture[..., c], where, order=1, mode="mirror") for c in range(3)]
    return np.stack(shown, -1)


@pytest.fixture(scope="module")
def views() -> tuple[list[np.ndarray], list[Camera]]:
    k = intrinsics_matrix(150, 150, WIDTH / 2, HEIGHT / 2)
    angles = np.linspace(-0.5, 0.5, VIEWS)
    eyes = [(3 * np.sin(a), 0.5 * np.cos(5 * a), -3 * np.cos(a)) for a in angles]
    cameras = [Camera(k, look_at(eye, (0, 0, 0)), WIDTH, HEIGHT) for eye in eyes]
    return [photo(camera) for camera in cameras], cameras


def poses_of(cameras: list[Camera]) -> np.ndarray:
    return np.stack([camera.world_to_camera for camera in cameras]).astype(np.float64)


def with_poses(cameras: list[Camera], poses: np.ndarray) -> list[Camera]:
    return [dataclasses.replace(c, world_to_camera=p) for c, p in zip(cameras, poses)]


def test_cameras_two_degrees_off_come_back(views):
    images, cameras = views
    true = poses_of(cameras)
    given = with_poses(cameras, off_by(true, 2.0, 0.02 * SIZE).astype(np.float32))
    found = refine_cameras(images, given, [None] * VIEWS, HELD_OUT, SIZE)
    assert found.moved and found.after < 0.5 < found.before, found.report()
    degrees, distance = errors(found.poses.astype(np.float64), true)
    assert degrees < 0.5 and distance < 0.005 * SIZE, (degrees, distance)


def test_one_wrong_camera_among_right_ones_is_noticed(views):
    images, cameras = views
    true = poses_of(cameras)
    start = true.copy()
    start[5:6] = off_by(true[5:6], 1.0, 0.01 * SIZE)
    given = with_poses(cameras, start.astype(np.float32))
    found = refine_cameras(images, given, [None] * VIEWS, HELD_OUT, SIZE)
    assert found.moved, found.report()
    assert errors(found.poses.astype(np.float64), true)[0] < 0.5


def test_right_cameras_and_pictures_of_nothing_stay_to_the_bit(views):
    images, cameras = views
    for pictures, least in ((images, 50), ([np.full_like(images[0], 99)] * VIEWS, 0)):
        found = refine_cameras(pictures, cameras, [None] * VIEWS, HELD_OUT, SIZE)
        assert not found.moved and found.points >= least, found.report()
        np.testing.assert_array_equal(found.poses, poses_of(cameras).astype(np.float32))


def test_held_out_photos_move_no_other_camera_and_masks_hide(views):
    images, cameras = views
    given = with_poses(cameras, off_by(poses_of(cameras), 1.0, 0.03).astype(np.float32))
    spoiled = [*images]
    spoiled[3] = images[3][::-1]
    hidden = np.zeros((HEIGHT, WIDTH), bool)
    masks = [hidden if i == 6 else None for i in range(VIEWS)]
    first, second = (refine_cameras(p, given, masks, HELD_OUT, SIZE) for p in (images, spoiled))
    np.testing.assert_array_equal(first.poses[~HELD_OUT], second.poses[~HELD_OUT])
    assert np.abs(first.poses[3] - second.poses[3]).max() > 1e-4
    # What shows nothing stays where it was given.
    np.testing.assert_allclose(first.poses[6], given[6].world_to_camera, atol=1e-5)


def test_points_are_followed_and_contradictions_left_out():
    def matches(*pairs: tuple[float, float]) -> Matches:
        columns = [np.float32([[x, 1] for x in column]) for column in zip(*pairs)]
        return Matches(*columns)

    # 10–20–30 is one point; 11 and 12 of the first view are both taken for 21
    pairs = {
        (0, 1): matches((10, 20), (11, 21)),
        (1, 2): matches((20, 30), (21, 31)),
        (0, 2): matches((10, 30), (12, 31)),
    }
    found = follow(pairs, np.ones(3, bool))
    assert found.views.tolist() == [0, 1, 2] and found.points.tolist() == [0, 0, 0]
    assert found.pixels[:, 0].tolist() == [10, 20, 30]
    without = follow(pairs, np.array([True, True, False]))
    assert sorted(without.pixels[:, 0]) == [10, 11, 20, 21]
    assert not len(follow({}, np.ones(3, bool)))


def test_the_longest_tracks_of_every_view_are_kept():
    points = np.array([0, 0, 1, 1, 1, 2, 2])
    seen = np.array([0, 1, 0, 1, 2, 0, 1])
    kept = longest(Tracks(seen, points, np.stack([points, seen], -1)), 1)
    assert kept.views.tolist() == [0, 1, 2] and set(kept.pixels[:, 0]) == {1}
    # of views 0 only: still all sightings of that point
    assert (
        len(longest(Tracks(seen, points, np.stack([points, seen], -1)), 3, np.arange(3) == 0)) == 7
    )


def test_views_that_look_elsewhere_are_no_neighbours():
    poses = np.stack([
        look_at((0, 0, -3), (0, 0, 0)), look_at((0.1, 0, -3), (0, 0, 0)),
        look_at((0.2, 0, -3), (0.2, 0, -9)), look_at((1, 0, -3), (0, 0, 0)),
    ])  # fmt: skip
    assert neighbours(poses, 1) == [(0, 1), (1, 3)]
