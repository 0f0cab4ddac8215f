import numpy as np
import pytest
from curate_scenes import make
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.tracking import (
    Tracks,
    fit_fundamental,
    fit_homography,
    follow_points,
    homography_error,
    pair_geometry,
    sampson_error,
    track_radii,
    turn_residual,
)

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


def pair(a, b):
    return pair_geometry(Tracks(np.stack([a, b], 1), SIZE), 0, 1, tolerance=1.5, seed=0)


def test_sampson_error_is_in_pixels():
    # a camera that slides sideways: epipolar lines are rows, so F = [t]ₓ with t = x
    f = np.array([[0.0, 0, 0], [0, 0, -1], [0, 1, 0]])
    a = np.array([[10.0, 20], [300, 50]])
    for d in (0.5, 3.0):
        error = sampson_error(f, a, a + [40, d])
        # the distance is shared between both images: d/√2
        np.testing.assert_allclose(error, d / np.sqrt(2), rtol=1e-6)
        np.testing.assert_allclose(sampson_error(1e3 * f, a, a + [40, d]), error, rtol=1e-6)


def test_missing_matrices_explain_nothing():
    a = np.zeros((3, 2), np.float32)
    assert fit_homography(a, a, 1.0, 0)[0] is None
    assert fit_fundamental(a, a, 1.0, 0)[0] is None
    assert np.isinf(sampson_error(None, a, a)).all()
    assert np.isinf(homography_error(None, a, a)).all()


def test_translation_shows_parallax():
    geometry = pair(project(cloud()), project(cloud(), 0.03, (0.6, 0.1, 0.2)))
    assert geometry.parallax_share > 0.3 and geometry.epipolar_share > 0.95


@pytest.mark.parametrize("turn, zoom", [(0.2, 1.0), (0.0, 1.6), (0.1, 1.3)])
def test_turning_and_zooming_show_none(turn, zoom):
    geometry = pair(project(cloud()), project(cloud(), turn, zoom=zoom))
    assert geometry.motion > 20
    assert geometry.parallax_share < 0.01 and geometry.turn_residual < 0.3


def test_travelling_past_a_flat_scene_is_told_from_turning():
    points = cloud(flat=True)
    geometry = pair(project(points), project(points, 0.4, (2.2, 0.0, 0.5)))
    assert geometry.parallax_share < 0.02 and geometry.turn_residual > 3


def test_turn_residual_of_nothing_is_zero():
    assert turn_residual(None, np.zeros((9, 2)), np.array(SIZE) / 2) == 0.0


def test_fits_are_repeatable():
    a, b = project(cloud()), project(cloud(), 0.03, (0.6, 0.1, 0.2))
    b[::7] += 25.0
    first, second = (fit_fundamental(a, b, 1.0, seed=3)[0] for _ in range(2))
    np.testing.assert_array_equal(first, second)


@settings(max_examples=25, deadline=None)
@given(st.floats(1, 80), st.integers(8, 60))
def test_radius_of_a_circular_track_is_found_at_480p(radius, count):
    angle = np.linspace(0, 2 * np.pi, count, endpoint=False)
    xy = 200 + radius * np.stack([np.cos(angle), np.sin(angle)], -1)
    for factor in (1, 2):  # the same motion at twice the resolution
        tracks = Tracks((factor * xy[None]).astype(np.float32), (640 * factor, 480 * factor))
        (found,) = track_radii(tracks, seed=0)
        assert 0 <= found <= radius * 1.001
        assert found >= 0.5 * radius  # 60 % of a circle needs most of its radius


def test_outlying_40_percent_do_not_count_and_radii_are_never_negative():
    xy = np.full((1, 20, 2), 100.0, np.float32)
    xy[0, 12:] += np.linspace(50, 300, 8)[:, None].astype(np.float32)
    assert track_radii(Tracks(xy, SIZE), seed=0)[0] == pytest.approx(0, abs=1e-2)
    assert len(track_radii(Tracks(np.full((4, 10, 2), np.nan, np.float32), SIZE), seed=0)) == 0


def test_points_follow_a_known_shift():
    gray = make("static", 1)[0][..., 1]
    frames = np.stack([np.roll(gray, 3 * i, axis=1) for i in range(6)])
    tracks = follow_points(frames)
    both = tracks.common(0, 5)
    moved = tracks.xy[both, 5] - tracks.xy[both, 0]
    assert len(both) > 80
    np.testing.assert_allclose(np.median(moved, axis=0), [15, 0], atol=0.1)
