"""What may stand unseen in the way of a view, and what may not."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from see3d_jax.geometry.cameras import Camera, intrinsics_matrix, look_at, stack
from see3d_jax.geometry.visibility import way_is_free

H, W = 24, 32
K = intrinsics_matrix(30, 30, W / 2, H / 2)
FRONT = Camera(K, look_at((0, 0, 0), (0, 0, 1)), W, H)


def _free(depth: np.ndarray, target: Camera, *sources: tuple[np.ndarray, Camera]) -> np.ndarray:
    depths, cameras = zip(*sources, strict=True)
    return np.asarray(
        way_is_free(depth[None], stack([target]), np.stack(depths), stack(list(cameras)))
    )[0]


def _post() -> np.ndarray:
    """Depth of a wall at 4 with a post at 2 before its middle."""
    depth = np.full((H, W), 4.0, np.float32)
    depth[:, 14:18] = 2.0
    return depth


def test_what_a_view_sees_itself_is_free():
    assert _free(_post(), FRONT, (_post(), FRONT)).all()


def test_behind_the_post_nobody_knows_until_somebody_has_looked():
    # From the right, the way to the wall on the left leads through what the post hides.
    aside = Camera(K, look_at((1.5, 0, 0.5), (0, 0, 4)), W, H)
    wall = np.full((H, W), 3.0, np.float32)  # about the wall's planar depth there
    alone = _free(wall, aside, (_post(), FRONT))
    assert 0.02 < (~alone).mean() < 0.6
    # A second view with nothing but the wall in it has seen that space empty.
    both = _free(wall, aside, (_post(), FRONT), (wall + 2, aside))
    assert both.all()
    # One without depth has seen nothing.
    blind = _free(wall, aside, (_post(), FRONT), (0 * wall, aside))
    np.testing.assert_array_equal(blind, alone)


def test_space_beside_the_picture_does_not_block():
    away = Camera(K, look_at((8, 0, 0), (8, 0, 1)), W, H)
    assert _free(np.full((H, W), 3.0, np.float32), away, (_post(), FRONT)).all()


def test_unknown_depth_is_free_and_never_nan():
    depth = _post()
    depth[:4] = 0
    depth[4:6] = np.nan
    free = _free(depth, FRONT, (depth, FRONT))
    assert free.dtype == bool and free.all()


def test_shapes_are_checked():
    camera = stack([FRONT])
    with pytest.raises(ValueError, match="expected depth"):
        way_is_free(jnp.zeros((1, H, W + 1)), camera, jnp.zeros((1, H, W)), camera)
    with pytest.raises(ValueError, match="source depths"):
        way_is_free(jnp.zeros((1, H, W)), camera, jnp.zeros((2, H, W)), camera)
