"""Camera paths: where they start, what they look at, how smooth they are, files."""

from __future__ import annotations

import numpy as np
import pytest

from see3d_jax.errors import InputError
from see3d_jax.geometry.cameras import Camera, intrinsics_matrix, look_at, project, stack
from see3d_jax.geometry.colmap_files import write_colmap
from see3d_jax.geometry.scene_files import PosedImages, write_transforms
from see3d_jax.geometry.trajectories import (
    MOVES,
    dolly_zoom,
    focus_distance,
    forward,
    from_file,
    interpolate,
    lemniscate,
    look_around,
    make_trajectory,
    orbit,
    spiral,
)

FIRST = Camera(intrinsics_matrix(50, 50, 32, 24), look_at((1, -2, -4), (0.5, 0, 1)), 64, 48)
FOCUS = 3.0


def _pivot(camera: Camera, distance: float) -> np.ndarray:
    to_world = np.asarray(camera.camera_to_world)
    return to_world[:3, 3] + to_world[:3, 2] * distance


@pytest.mark.parametrize("name", MOVES)
def test_every_move_is_a_batch_of_rigid_cameras(name):
    path = make_trajectory(name, FIRST, FOCUS, 7)
    rotation = np.asarray(path.world_to_camera)[:, :3, :3]
    np.testing.assert_allclose(rotation @ rotation.swapaxes(-1, -2),
                               np.broadcast_to(np.eye(3), (7, 3, 3)), atol=1e-5)  # fmt: skip
    np.testing.assert_allclose(np.linalg.det(rotation), 1, atol=1e-5)
    assert path.intrinsics.shape == (7, 3, 3) and (path.width, path.height) == (64, 48)


def test_orbit_keeps_distance_and_aim_and_passes_the_first_view():
    path = orbit(FIRST, FOCUS, 5, degrees=60)
    pivot = _pivot(FIRST, FOCUS)
    pixels, depth = project(path, np.broadcast_to(pivot, (5, 1, 3)).astype(np.float32))
    np.testing.assert_allclose(pixels, np.broadcast_to([32, 24], (5, 1, 2)), atol=1e-3)
    np.testing.assert_allclose(depth, FOCUS, rtol=1e-5)
    np.testing.assert_allclose(path.world_to_camera[2], FIRST.world_to_camera, atol=1e-5)
    ends = np.asarray(path.position)[[0, -1]] - pivot
    cosine = ends[0] @ ends[1] / np.linalg.norm(ends, axis=-1).prod()
    np.testing.assert_allclose(np.degrees(np.arccos(cosine)), 60, atol=0.1)


def test_full_orbit_starts_at_the_first_view_and_does_not_repeat_it():
    path = orbit(FIRST, FOCUS, 8, degrees=360)
    np.testing.assert_allclose(path.world_to_camera[0], FIRST.world_to_camera, atol=1e-5)
    steps = np.diff(np.concatenate([path.position, path.position[:1]]), axis=0)
    lengths = np.linalg.norm(steps, axis=-1)
    np.testing.assert_allclose(lengths, lengths[0], rtol=1e-4)


def test_orbit_to_the_right_shows_the_pivots_right_side():
    """Later views stand to the first camera's left or right, level with it."""
    path = orbit(FIRST, FOCUS, 3, degrees=20)
    in_first, _ = project(FIRST, _pivot(FIRST, FOCUS)[None].astype(np.float32))
    to_first = np.asarray(FIRST.world_to_camera)
    local = np.asarray(path.position) @ to_first[:3, :3].T + to_first[:3, 3]
    assert local[0, 0] * local[2, 0] < 0 and np.allclose(local[:, 1], 0, atol=1e-4)
    np.testing.assert_allclose(in_first, [[32, 24]], atol=1e-3)


def test_spiral_starts_and_ends_at_the_first_view_and_looks_at_the_pivot():
    path = spiral(FIRST, FOCUS, 9)
    for end in (0, -1):
        np.testing.assert_allclose(path.world_to_camera[end], FIRST.world_to_camera, atol=1e-5)
    pivot = np.broadcast_to(_pivot(FIRST, FOCUS), (9, 1, 3)).astype(np.float32)
    pixels, _ = project(path, pivot)
    np.testing.assert_allclose(pixels, np.broadcast_to([32, 24], (9, 1, 2)), atol=1e-3)


def test_forward_moves_along_the_axis_and_look_around_stays():
    path = forward(FIRST, FOCUS, 3, travel=0.5)
    np.testing.assert_allclose(path.position[-1], _pivot(FIRST, 1.5), atol=1e-5)
    np.testing.assert_array_equal(path.world_to_camera[0], FIRST.world_to_camera)
    turned = look_around(FIRST, 3, degrees=90)
    np.testing.assert_allclose(turned.position, np.broadcast_to(FIRST.position, (3, 3)), atol=1e-5)


def test_interpolation_meets_its_keys_and_is_smooth():
    keys = stack([
        Camera(intrinsics_matrix(50 + i, 50, 32, 24),
               look_at((3 * np.cos(a), -1, 3 * np.sin(a)), (0, 0, 0)), 64, 48)
        for i, a in enumerate(np.linspace(0, 2, 5))
    ])  # fmt: skip
    path = interpolate(keys, 41)
    np.testing.assert_allclose(path.world_to_camera[::10], keys.world_to_camera, atol=1e-5)
    np.testing.assert_allclose(path.intrinsics[::10], keys.intrinsics, rtol=1e-6)
    steps = np.linalg.norm(np.diff(np.asarray(path.position), axis=0), axis=-1)
    assert steps.max() < 1.25 * steps.min()


def test_paths_from_files(tmp_path):
    path = orbit(FIRST, FOCUS, 3)
    posed = PosedImages(("0.png", "1.png", "2.png"), tuple(path[i] for i in range(3)))
    write_transforms(tmp_path / "transforms.json", posed)
    write_colmap(tmp_path / "model", posed)
    lines = ["x, y, z, qw, qx, qy, qz"]
    from see3d_jax.geometry.transforms import rotation_to_quaternion

    for matrix in np.asarray(path.camera_to_world, np.float64):
        values = (*matrix[:3, 3], *rotation_to_quaternion(matrix[:3, :3]))
        lines.append(", ".join(repr(float(v)) for v in values))
    (tmp_path / "path.csv").write_text("\n".join(lines))
    like = FIRST.resized(32, 24)
    for name in ("transforms.json", "model", "path.csv", "."):
        read = from_file(tmp_path / name, like)
        np.testing.assert_allclose(read.world_to_camera, path.world_to_camera, atol=1e-5)
        np.testing.assert_allclose(read.intrinsics, path.resized(32, 24).intrinsics, rtol=1e-5)
        assert (read.width, read.height) == (32, 24)


@pytest.mark.parametrize(
    "text, message",
    [
        ("x,y,z\n1,2,3\n", "line 2: qw must be a number"),
        ("x,y,z,qw,qx,qy,qz\n1,2,3,0,0,0,0\n", "quaternion is zero"),
        ("x,y,z,qw,qx,qy,qz\n1,2,nan,1,0,0,0\n", "line 2: z must be finite"),
        ("", "holds no camera"),
    ],
)
def test_bad_csv(tmp_path, text, message):
    (tmp_path / "path.csv").write_text(text)
    with pytest.raises(InputError, match=message):
        from_file(tmp_path / "path.csv", FIRST)


def test_unknown_names_and_options():
    with pytest.raises(InputError, match="neither one of orbit"):
        make_trajectory("loop", FIRST, FOCUS, 3)
    with pytest.raises(InputError, match="unknown option"):
        make_trajectory("orbit", FIRST, FOCUS, 3, speed=2)
    with pytest.raises(InputError, match="at least 1"):
        make_trajectory("orbit", FIRST, FOCUS, 0)


def test_focus_is_the_median_of_the_middle_and_ignores_unknown_depth():
    depth = np.full((40, 40), 9.0)
    depth[10:30, 10:30] = 2.0
    depth[12:14] = 0
    assert focus_distance(depth) == 2.0
    depth[10:30, 10:30] = np.nan
    assert focus_distance(depth) == 9.0
    with pytest.raises(InputError, match="no pixel has a known depth"):
        focus_distance(np.zeros((4, 4)))


def test_dolly_zoom_keeps_the_size_of_what_is_in_focus():
    path = dolly_zoom(FIRST, 3.0, 4, travel=0.5)
    to_world = np.asarray(FIRST.camera_to_world)
    board = np.array([[-1, 0.5, 3, 1], [1, -0.5, 3, 1]]) @ to_world.T
    seen = [np.asarray(project(path[i], board[:, :3].astype(np.float32))[0]) for i in range(4)]
    for view in seen:
        np.testing.assert_allclose(view, seen[0], atol=1e-3)
    behind = (np.array([[1, 0, 9, 1]]) @ to_world.T)[:, :3].astype(np.float32)
    shifts = [float(project(path[i], behind)[0][0, 0]) for i in range(4)]
    assert all(np.diff(shifts) < -0.1)  # zooming out: the background shrinks
    with pytest.raises(InputError, match="travel"):
        dolly_zoom(FIRST, 3.0, 4, travel=1.0)


def test_lemniscate_crosses_the_first_view_and_faces_the_pivot():
    path = lemniscate(FIRST, 3.0, 8)
    for i in (0, 4):
        np.testing.assert_allclose(path.world_to_camera[i], FIRST.world_to_camera, atol=1e-5)
    pivot = (np.asarray(FIRST.camera_to_world) @ [0, 0, 3.0, 1])[:3].astype(np.float32)
    for i in range(8):
        np.testing.assert_allclose(project(path[i], pivot[None])[0][0], [32, 24], atol=1e-2)
