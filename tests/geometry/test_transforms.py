"""Rotations: round trips and interpolation, over random rotations."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from see3d_jax.geometry.transforms import (
    nearest_rotation,
    quaternion_to_rotation,
    rotation_to_quaternion,
    slerp,
)

unit = st.floats(-1, 1, width=32)
quaternions = st.tuples(unit, unit, unit, unit).map(np.array).filter(
    lambda q: np.linalg.norm(q) > 0.1
)  # fmt: skip


@given(quaternions)
def test_rotation_survives_the_quaternion_round_trip(q):
    rotation = quaternion_to_rotation(q)
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-12)
    assert np.linalg.det(rotation) > 0
    back = quaternion_to_rotation(rotation_to_quaternion(rotation))
    np.testing.assert_allclose(back, rotation, atol=1e-12)


def test_quaternion_is_wxyz():
    quarter = np.array([np.cos(np.pi / 4), 0, 0, np.sin(np.pi / 4)])  # 90° about z: x → y
    np.testing.assert_allclose(quaternion_to_rotation(quarter) @ [1, 0, 0], [0, 1, 0], atol=1e-12)


@given(quaternions, quaternions, st.floats(0, 1))
def test_slerp_turns_at_constant_speed_along_the_shorter_arc(a, b, weight):
    ra, rb = quaternion_to_rotation(a), quaternion_to_rotation(b)
    rm = quaternion_to_rotation(slerp(a, b, weight))

    def angle(first, second):
        return np.arccos(np.clip((np.trace(first.T @ second) - 1) / 2, -1, 1))

    total = angle(ra, rb)
    # arccos near 0 and π turns 1e-15 into 1e-7
    np.testing.assert_allclose(angle(ra, rm), weight * total, atol=1e-6)
    np.testing.assert_allclose(angle(rm, rb), (1 - weight) * total, atol=1e-6)


def test_nearest_rotation_never_mirrors():
    mirrored = np.diag([1.0, 1.0, -1.0])
    assert np.linalg.det(nearest_rotation(mirrored)) > 0
    np.testing.assert_allclose(nearest_rotation(1.001 * np.eye(3)), np.eye(3), atol=1e-12)
