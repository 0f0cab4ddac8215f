"""Scaling frames: as smooth as the mean over each output pixel's area, and never brighter."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from skimage import data

from see3d_jax.data.transforms import scale_image


def photo(name, side=480):
    """A whole photo, as sharp as so many pixels can show it."""
    image = Image.fromarray(getattr(data, name)())
    shorter = min(image.size)
    part = (0, 0, shorter, shorter)
    return np.asarray(image.resize((side, side), Image.Resampling.LANCZOS, box=part))


@pytest.mark.parametrize("name", ["astronaut", "chelsea", "coffee", "rocket"])
@pytest.mark.parametrize("side", [240, 256, 300, 340, 400, 460, 479])
def test_shrinking_agrees_with_the_mean_over_areas(name, side):
    """To one grey level of 255 on average; Pillow's antialiased filter is up to 1.9 away.

    Interpolation alone would be 1.3 away at 256 and let through what aliases.
    """
    image = photo(name)
    found = scale_image(image, (side, side)).astype(int)
    wanted = cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA)
    difference = np.abs(found - wanted)
    assert difference.mean() < 1.05
    assert 10 * np.log10(255**2 / (difference**2).mean()) > 41.5


def test_stripes_finer_than_the_view_can_show_fade():
    stripes = np.zeros((480, 480, 3), np.uint8)
    stripes[:, ::2] = 255
    shown = scale_image(stripes, (256, 256))
    interpolated = cv2.resize(stripes, (256, 256), interpolation=cv2.INTER_LINEAR)
    assert shown.std() < 0.6 * interpolated.std()
    assert abs(shown.mean() - 127.5) < 1


@given(
    value=st.integers(0, 255),
    height=st.integers(16, 40),
    width=st.integers(16, 40),
)
def test_flat_stays_flat_at_every_scale(value, height, width):
    """Enlarged, shrunk a little, shrunk a lot: weights add up to 1 exactly."""
    flat = np.full((32, 36, 3), value, np.uint8)
    for size in ((height, width), (height // 3, width // 3)):
        scaled = scale_image(flat, size)
        assert scaled.shape == (*size, 3)
        assert (scaled == value).all()


def test_both_sides_are_smoothed_for_their_own_factor():
    image = photo("coffee")[:, :300]
    found = scale_image(image, (256, 290))
    turned = scale_image(np.ascontiguousarray(image.transpose(1, 0, 2)), (290, 256))
    assert np.abs(found.astype(int) - turned.transpose(1, 0, 2)).max() <= 1
