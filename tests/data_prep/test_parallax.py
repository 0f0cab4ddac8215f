import numpy as np
import pytest
from curate_scenes import HEIGHT, WIDTH, make, rotated, scene

from data_prep.parallax import pair_geometry, pair_points, turn_residual, wide_pairs
from data_prep.tracking import follow_points

SIZE = (640, 480)
K = np.array([[500.0, 0, 320], [0, 500, 240], [0, 0, 1]])


def project(points, turn=0.0, shift=(0.0, 0.0, 0.0), zoom=1.0):
    c, s = np.cos(turn), np.sin(turn)
    seen = points @ np.array([[c, 0, -s], [0, 1, 0], [s, 0, c]]).T + np.asarray(shift)
    pixel = seen @ (K * [[zoom, 1, 1], [1, zoom, 1], [1, 1, 1]]).T
    return (pixel[:, :2] / pixel[:, 2:]).astype(np.float32)


def cloud(count=200, flat=False, seed=0):
    g = np.random.default_rng(seed)
    points = g.uniform([-2, -1.5, 3], [2, 1.5, 9], (count, 3))
    if flat:  # a floor that recedes
        points[:, 2] = 5 + 2.0 * points[:, 1]
    return points


def turned(points, angle):
    c, s = np.cos(angle), np.sin(angle)
    center = points.mean(0)
    return (points - center) @ np.array([[c, 0, -s], [0, 1, 0], [s, 0, c]]).T + center


def explain(see):
    """Geometry of what `see` shows at the times 0, 1/2 and 1."""
    return pair_geometry(see(0.0), see(0.5), see(1.0), SIZE, tolerance=1.5, seed=0)


def test_translation_shows_parallax():
    geometry = explain(lambda t: project(cloud(), 0.03 * t, (0.6 * t, 0.1 * t, 0.2 * t)))
    assert geometry.parallax_share > 0.3 and geometry.parallax_spread > 0.2
    assert geometry.rigid_share > 0.95


@pytest.mark.parametrize("turn, zoom", [(0.2, 1.0), (0.0, 1.6), (0.1, 1.3)])
def test_turning_and_zooming_show_none_and_are_rigid(turn, zoom):
    geometry = explain(lambda t: project(cloud(), turn * t, zoom=1 + (zoom - 1) * t))
    assert geometry.parallax_share < 0.01 and geometry.turn_residual < 0.3
    assert geometry.rigid_share > 0.95


def test_travelling_past_a_flat_scene_is_told_from_turning():
    points = cloud(flat=True)
    geometry = explain(lambda t: project(points, 0.4 * t, (2.2 * t, 0.0, 0.5 * t)))
    assert geometry.parallax_share < 0.02 and geometry.turn_residual > 3.5


def test_a_thing_turned_before_a_standing_camera_is_no_rigid_scene():
    wall, thing = cloud(120), cloud(120, seed=1) * [0.3, 0.3, 0.1] + [0, 0, 2.2]

    def see(t):
        lift = (0.3 * np.sin(2.5 * t), 0.1 * t, 0.0)
        return np.concatenate([project(wall), project(turned(thing, 0.6 * t), shift=lift)])

    assert explain(see).rigid_share < 0.65


def test_a_thing_that_slides_before_a_turning_camera_has_a_single_parallax():
    wall, thing = cloud(140), cloud(60, seed=1) * [0.3, 0.3, 0.02] + [0, 0, 2.5]

    def see(t):
        return np.concatenate([
            project(wall, 0.05 * t), project(thing + [0.4 * t, 0, 0], 0.05 * t)
        ])  # fmt: skip

    geometry = explain(see)
    assert geometry.parallax_share > 0.2, "to two frames it looks like a near object"
    assert geometry.parallax_spread < 0.1 and geometry.travel_residual < 0.6


def test_a_turning_camera_is_seen_behind_a_thing_with_most_of_the_tracks():
    wall, thing = cloud(70), cloud(130, seed=1) * [0.3, 0.3, 0.0] + [0, 0, 2.5]

    def see(t):
        lean = turned(thing, 0.3 * t) + [0.4 * t, 0, 0]
        return np.concatenate([project(wall, 0.05 * t), project(lean, 0.05 * t)])

    geometry = explain(see)
    assert geometry.turn_residual > 1.0 and geometry.travel_residual < 0.6


def test_turn_residual_of_nothing_is_zero():
    assert turn_residual(None, np.zeros((9, 2)), np.array(SIZE) / 2) == 0.0


def test_too_few_points_explain_nothing():
    few = project(cloud(9))
    assert pair_geometry(few, few, few, SIZE, 1.5, seed=0).rigid_share == 0.0


def test_drift_of_tracks_is_removed_on_the_plane():
    """Points of a zoomed picture that drifted by two pixels are found again where they belong."""
    flat = scene()
    frames = np.stack([rotated(flat, 0, 1 + 0.05 * i) for i in range(5)])
    tracks = follow_points(frames[..., 1])
    both = tracks.common(0, 4)
    true = (tracks.xy[both, 0] - [WIDTH / 2, HEIGHT / 2]) * 1.2 + [WIDTH / 2, HEIGHT / 2]
    drifted = tracks.xy.copy()
    drifted[both, 4] = true + np.random.default_rng(0).normal(0, 1.0, true.shape)
    tracks = type(tracks)(drifted, tracks.size)
    _, _, end = pair_points(tracks, frames, (0, 4), tolerance=1.5, seed=0)
    before = np.linalg.norm(drifted[both, 4] - true, axis=1)
    after = np.linalg.norm(end - true, axis=1)
    assert np.median(before) > 1.0 and np.median(after) < 0.25


def test_wide_pairs_share_enough_tracks():
    grays = np.stack([frame[..., 1] for frame in make("parallax", 8)])
    tracks = follow_points(grays)
    pairs = wide_pairs(tracks)
    assert pairs and all(0 <= a < b < 8 for a, b in pairs)
    assert all(len(tracks.common(a, b)) >= 40 for a, b in pairs)
