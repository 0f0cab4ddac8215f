"""Masks: binary, of the wanted size, irregular, and the same for the same seed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from see3d_jax.data import masks


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    height=st.integers(32, 96),
    width=st.integers(32, 96),
    share=st.floats(0.05, 0.95),
    kind=st.sampled_from(masks.KINDS),
)
def test_the_share_of_holes_is_what_was_asked_for(seed, height, width, share, kind):
    mask = masks.random_mask(np.random.default_rng(seed), height, width, (share, share), (kind,))
    assert mask.shape == (height, width, 1) and mask.dtype == np.float32
    assert set(np.unique(mask)) <= {0.0, 1.0}
    assert abs((1 - mask).mean() - share) < 0.1


def test_shares_cover_the_whole_range_evenly():
    rng = np.random.default_rng(0)
    holes = [1 - masks.random_mask(rng, 48, 48, (0.1, 0.9)).mean() for _ in range(300)]
    counts, _ = np.histogram(holes, bins=4, range=(0.1, 0.9))
    assert counts.min() > 45  # 75 expected in each quarter


def test_the_same_seed_gives_the_same_mask_and_another_seed_another():
    first, again, other = (
        masks.random_mask(np.random.default_rng(seed), 64, 64) for seed in (3, 3, 4)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


@pytest.mark.parametrize("kind", masks.KINDS)
def test_holes_are_regions_not_noise(kind):
    """A hole pixel mostly has hole neighbours; salt-and-pepper masks of 40 % would give 0.4."""
    rng = np.random.default_rng(1)
    hole = np.stack([1 - masks.random_mask(rng, 64, 64, (0.4, 0.4), (kind,)) for _ in range(20)])
    right_neighbour_too = (hole[:, :, :-1] * hole[:, :, 1:]).sum() / hole[:, :, :-1].sum()
    assert right_neighbour_too > 0.8
