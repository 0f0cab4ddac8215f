"""Warping: exact where it must be, measured where it cannot."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from see3d_jax.geometry.cameras import Camera, intrinsics_matrix, look_at, pixel_grid, stack
from see3d_jax.geometry.trajectories import look_around
from see3d_jax.geometry.warping import warp_views

H, W = 36, 48
K = intrinsics_matrix(45, 45, W / 2, H / 2)


def _camera(eye=(0, 0, 0), target=(0, 0, 1)) -> Camera:
    return Camera(K, look_at(eye, target), W, H)


def _pattern(points: np.ndarray) -> np.ndarray:
    """A smooth colour for each world point [..., 3], of more than two pixels' wavelength."""
    phases = np.stack([2 * points[..., 0], 2 * points[..., 1], points.sum(-1)], -1)
    return (0.5 + 0.4 * np.sin(2.5 * phases)).astype(np.float32)


def _render(camera: Camera, box: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """A wall at z = 4 and, in front of it, a rectangle at z = 2: exact colour and planar depth."""
    pixels = pixel_grid(H, W).astype(np.float64)
    rays = np.concatenate([(pixels - [W / 2, H / 2]) / 45, np.ones((H, W, 1))], -1)
    to_world = np.asarray(camera.camera_to_world, np.float64)
    rays, origin = rays @ to_world[:3, :3].T, to_world[:3, 3]
    t = (4 - origin[2]) / rays[..., 2]
    near = (2 - origin[2]) / rays[..., 2]
    hit = origin + near[..., None] * rays
    inside = (np.abs(hit[..., 0]) < 0.5) & (np.abs(hit[..., 1]) < 0.4) & box
    t = np.where(inside, near, t)
    return _pattern(origin + t[..., None] * rays), t.astype(np.float32)


def _psnr(a, b, known):
    return -10 * np.log10(np.mean((a - b)[known] ** 2))


def _warp(sources: list[Camera], targets: list[Camera], **options):
    rendered = [_render(camera) for camera in sources]
    return warp_views(
        np.stack([r[0] for r in rendered]), np.stack([r[1] for r in rendered]),
        stack(sources), stack(targets), **options,
    )  # fmt: skip


def test_identity_is_exact_to_the_bit():
    camera = _camera((0.3, -0.2, 0.1), (0.1, 0, 3))
    image, depth = _render(camera)
    warped = _warp([camera], [camera], edge_threshold=None)
    assert np.all(np.asarray(warped.known) == 1)
    np.testing.assert_array_equal(warped.image[0], image)
    np.testing.assert_allclose(warped.depth[0], depth, rtol=1e-6)
    with_edges = _warp([camera], [camera])
    known = np.asarray(with_edges.known)[0, ..., 0] > 0
    np.testing.assert_array_equal(np.asarray(with_edges.image)[0][known], image[known])
    dropped = ~known  # only the outline of the rectangle: its edge and the rim, on either side
    assert 0.02 < dropped.mean() < 0.19
    assert np.all(np.asarray(with_edges.image)[0][dropped] == 0)


def test_pure_rotation_does_not_depend_on_depth():
    first = _camera()
    path = look_around(first, 2, degrees=16)
    rng = np.random.default_rng(0)
    image, _ = _render(first, box=False)
    results = [
        warp_views(image[None], depth[None], stack([first]), path, edge_threshold=None)
        for depth in (np.full((H, W), 2.0), np.full((H, W), 7.0) + rng.uniform(0, 1e-3, (H, W)))
    ]
    np.testing.assert_allclose(results[0].image, results[1].image, atol=2e-3)
    for i in range(2):
        truth, _ = _render(path[i], box=False)
        known = np.asarray(results[0].known)[i, ..., 0] > 0
        assert 0.7 < known.mean() < 0.95
        assert _psnr(np.asarray(results[0].image)[i], truth, known) > 45


def test_translation_shows_the_right_surface_and_leaves_the_uncovered_open():
    source, targets = _camera(), [_camera((0.35, 0, 0), (0.35, 0, 1)), _camera((0, 0, 0.6))]
    warped = _warp([source], targets)
    for i, target in enumerate(targets):
        truth, depth = _render(target)
        known = np.asarray(warped.known)[i, ..., 0] > 0
        assert _psnr(np.asarray(warped.image)[i], truth, known) > 38
        wrong = np.abs(np.asarray(warped.depth)[i] / depth - 1)[known] > 0.02
        assert wrong.mean() < 0.005
    sideways = np.asarray(warped.known)[0, ..., 0]
    # the rectangle moves by 45·0.35/2 = 7.9 px, the wall by 3.9 px: 4 px of wall were hidden, and
    # edge and rim take up to two pixels on each side of the rectangle
    row = sideways[H // 2, : W - 4]
    assert 4 <= (row == 0).sum() <= 12


@pytest.mark.parametrize("closer", [1.0, 1.8])
def test_magnified_surfaces_have_no_cracks(closer):
    """Approaching until pixels are almost twice as large leaves no hole inside the wall."""
    source, target = _camera(), _camera((0, 0, 4 - 4 / closer), (0, 0, 5))
    image, depth = _render(source, box=False)
    warped = warp_views(image[None], depth[None], stack([source]), stack([target]))
    assert np.asarray(warped.known).mean() == 1


@pytest.mark.parametrize("closer, known", [(1.4, 1.0), (1.8, 0.0)])
def test_what_a_source_shows_too_small_is_left_open(closer, known):
    source, target = _camera(), _camera((0, 0, 4 - 4 / closer), (0, 0, 5))
    image, depth = _render(source, box=False)
    warped = warp_views(
        image[None], depth[None], stack([source]), stack([target]), most_stretch=1.6
    )
    assert np.asarray(warped.known).mean() == known


def test_slanted_wall_is_exact_in_depth():
    """Slopes come from neighbours; on a plane they are exact, so warped depth is too."""
    camera = _camera((-1.5, 0, 0.5), (0.5, 0, 4))
    target = _camera((-1.2, 0.1, 0.4), (0.6, 0, 4))
    image, depth = _render(camera, box=False)
    warped = warp_views(image[None], depth[None], stack([camera]), stack([target]))
    known = np.asarray(warped.known)[0, ..., 0] > 0
    np.testing.assert_allclose(
        np.asarray(warped.depth)[0][known], _render(target, box=False)[1][known], rtol=1e-4
    )
    assert known.mean() > 0.75


def test_a_second_source_fills_what_the_first_cannot_see():
    left, right, middle = _camera((-0.5, 0, 0)), _camera((0.5, 0, 0)), _camera()
    one = _warp([left], [middle])
    two = _warp([left, right], [middle])
    assert np.asarray(two.known).mean() > np.asarray(one.known).mean() + 0.05
    truth, depth = _render(middle)
    known = np.asarray(two.known)[0, ..., 0] > 0
    assert _psnr(np.asarray(two.image)[0], truth, known) > 38
    assert (np.abs(np.asarray(two.depth)[0] / depth - 1)[known] > 0.02).mean() < 0.005


def test_a_surface_seen_from_behind_hides_but_is_not_known():
    """From the far side of the wall its back is in view, of which the source knows nothing."""
    source = _camera()
    behind = Camera(K, look_at((0, 0, 8), (0, 0, 4)), W, H)
    image, depth = _render(source, box=False)
    warped = warp_views(image[None], depth[None], stack([source]), stack([behind]))
    assert np.asarray(warped.known).sum() == 0


def test_unknown_depth_leaves_holes_and_no_nan():
    source = _camera()
    image, depth = _render(source)
    depth[:10] = 0
    depth[10:12, :5] = np.nan
    warped = warp_views(image[None], depth[None], stack([source]), stack([source]))
    for part in (warped.image, warped.depth, warped.known):
        assert np.all(np.isfinite(part))
    assert np.asarray(warped.known)[0, :10].sum() == 0
    nothing = warp_views(image[None], 0 * depth[None], stack([source]), stack([source]))
    assert np.asarray(nothing.known).sum() == 0 and np.asarray(nothing.image).sum() == 0


def test_shapes_are_checked():
    camera = stack([_camera()])
    with pytest.raises(ValueError, match="expected images"):
        warp_views(jnp.zeros((1, H, W + 1, 3)), jnp.ones((1, H, W)), camera, camera)
    with pytest.raises(ValueError, match="batch"):
        warp_views(jnp.zeros((1, H, W, 3)), jnp.ones((1, H, W)), camera, camera[0])


def test_rendered_room_with_exact_depth(shared):
    """Real render, 8.7° apart: highlights move and texture is resampled, geometry must not fail."""
    from see3d_jax.pipelines.inputs import load_depth, load_images, load_scene

    scene = load_scene(shared / "data/rendered/room")
    pairs = ((4, 5), (26, 24))  # orbit, and a step back on the walk
    for a, b in pairs:
        images, cameras = load_images(scene, (a, b))
        images = np.stack(images).astype(np.float32) / 255
        cameras = stack(cameras)
        warped = warp_views(images[:1], load_depth(scene, a)[None], cameras[:1], cameras[1:])
        known = np.asarray(warped.known)[0, ..., 0] > 0
        wrong = np.abs(np.asarray(warped.depth)[0] / load_depth(scene, b) - 1)[known] > 0.02
        assert known.mean() > 0.7
        assert wrong.mean() < 0.005
        assert _psnr(np.asarray(warped.image)[0], images[1], known) > 30.5


def test_gradients_reach_picture_and_depth():
    source, target = _camera(), _camera((0.2, 0, 0), (0.2, 0, 1))
    image, depth = _render(source, box=False)

    def brightness(image, depth):
        warped = warp_views(image[None], depth[None], stack([source]), stack([target]))
        return jnp.square(warped.image).sum()

    by_image, by_depth = jax.grad(brightness, (0, 1))(jnp.asarray(image), jnp.asarray(depth))
    # Twice as bright is four times as much: Euler's identity for degree two, exact.
    total = float(brightness(image, depth))
    assert float((by_image * image).sum()) == pytest.approx(2 * total, rel=1e-4)
    # A wall that moves away moves the picture by a fraction of a pixel.
    step = 1e-3
    moved = [float(brightness(image, depth + sign * step)) for sign in (1, -1)]
    assert float(by_depth.sum()) == pytest.approx((moved[0] - moved[1]) / (2 * step), rel=0.1)
