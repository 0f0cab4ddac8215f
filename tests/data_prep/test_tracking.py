import numpy as np
import pytest
from curate_scenes import make
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.tracking import Tracks, follow_points, track_radii

SIZE = (640, 480)


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
