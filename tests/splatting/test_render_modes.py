"""Anti-aliased drawing and normals: against the dense renderer, finite differences, by sense."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from see3d_jax.geometry.cameras import Camera, intrinsics_matrix
from see3d_jax.splatting.gaussians import Gaussians
from see3d_jax.splatting.reference import render_dense
from see3d_jax.splatting.render import render, render_within
from tests.splatting.test_render import (
    CAMERA,
    CAPACITY,
    HEIGHT,
    WIDTH,
    adversarial,
    assert_slopes_are_those_of,
    random_scene,
)

WEIGHTS = np.random.default_rng(7).normal(size=(HEIGHT, WIDTH, 8)).astype(np.float32)
BACKGROUND = np.float32([0.2, 0.5, 0.8])


def loss_of(renderer):
    def loss(scene, camera, background):
        picture = renderer(scene, camera, background)
        maps = [picture.rgb, picture.depth[..., None], picture.alpha[..., None], picture.normals]
        return (jnp.concatenate(maps, -1) * WEIGHTS).sum(), picture

    return loss


def fast(scene, camera, background):
    return render_within(scene, camera, CAPACITY, background, antialiased=True, with_normals=True)


slow = partial(render_dense, antialiased=True)
draw_fast, draw_slow = (
    jax.jit(jax.grad(loss_of(renderer), argnums=(0, 1, 2), has_aux=True))
    for renderer in (fast, slow)
)


def layers() -> Gaussians:
    """400 faint Gaussians, one behind the other, on one pixel of the image."""
    rng = np.random.default_rng(3)
    number = 400
    means = np.float32([0.4, -0.3, -4]) * np.linspace(0.5, -1, number, dtype=np.float32)[:, None]
    leaves = (
        means, rng.normal(-4, 0.3, (number, 3)), rng.normal(size=(number, 4)),
        rng.normal(-3, 0.5, number), rng.normal(0, 0.4, (number, 1, 3)),
    )  # fmt: skip
    return Gaussians(*(jnp.asarray(leaf, jnp.float32) for leaf in leaves))


KINDS = (
    "random", "narrower than a pixel", "hundreds of layers", "behind and at the camera", "huge",
    "tiny", "flat and needle", "at the edges", "far away", "nothing to draw",
)  # fmt: skip
# Where float32 gradients of the whole scene are within 1e-3: the others hold parts beyond float32.
EXACT_GRADIENTS = KINDS[:3]


def scene_of(kind: str) -> Gaussians:
    if kind == "hundreds of layers":
        return layers()
    if kind in KINDS[:2]:
        return random_scene(1, log_scale=-1.8 if kind == "random" else -4.0)
    return adversarial(kind)


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_and_gradients_match_the_dense_renderer(kind):
    scene = scene_of(kind)
    gradient, drawn = draw_fast(scene, CAMERA, BACKGROUND)
    assert int(drawn.pair_count) <= CAPACITY
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: np.asarray(x, np.float64), (scene, CAMERA, BACKGROUND))
        expected, exact = jax.tree.map(np.asarray, draw_slow(*wide))
    for field in ("rgb", "alpha", "depth", "normals"):
        found, wanted = getattr(drawn, field), getattr(exact, field)
        reach = max(1.0, float(np.abs(wanted).max()))
        np.testing.assert_allclose(found / reach, wanted / reach, atol=1e-5, err_msg=field)
    named = jax.tree_util.tree_leaves_with_path(gradient)
    assert len(named) == 8  # five parameter groups, intrinsics, pose, background
    for (path, leaf), wanted in zip(named, jax.tree.leaves(expected), strict=True):
        assert np.isfinite(leaf).all()
        if kind in EXACT_GRADIENTS:
            error = np.abs(leaf - wanted).max() / np.abs(wanted).max()
            assert error < 1e-3, f"{jax.tree_util.keystr(path)}: {error}"
    if kind == "nothing to draw":
        np.testing.assert_allclose(drawn.rgb, np.broadcast_to(BACKGROUND, drawn.rgb.shape))
        assert float(jnp.abs(drawn.normals).max()) == 0 and int(drawn.pair_count) == 0


def test_gradients_match_finite_differences_in_float64():
    arguments = random_scene(2), CAMERA, BACKGROUND
    analytic, _ = draw_fast(*arguments)
    assert_slopes_are_those_of(lambda *a: loss_of(slow)(*a)[0], arguments, analytic)


def one(log_scales) -> Gaussians:
    leaves = [(0.1, -0.2, 4.0)], [log_scales], [(0.9, 0.3, -0.2, 0.1)], [3.0], [[(1.0, 1, 1)]]
    return Gaussians(*(jnp.asarray(leaf, jnp.float32) for leaf in leaves))


def camera_with(focal: float) -> Camera:
    return Camera(intrinsics_matrix(focal, focal, 32, 32), np.eye(4, dtype=np.float32), 64, 64)


def test_light_of_a_small_gaussian_does_not_depend_on_the_number_of_pixels():
    scene = one((-4.0, -4.0, -4.0))  # a standard deviation of 0.15 to 0.6 pixels

    def light(focal: float, antialiased: bool) -> float:
        picture = render(scene, camera_with(focal), antialiased=antialiased, with_normals=True)
        return float(picture.alpha.sum()) / focal**2

    soft = [light(focal, True) for focal in (32, 64, 128)]
    plain = [light(focal, False) for focal in (32, 64, 128)]
    assert max(soft) < 1.35 * min(soft)
    assert plain[0] > 4 * plain[2]  # without, what is far away swells


def test_normals_are_the_shortest_axis_turned_to_the_camera():
    camera = camera_with(64)
    for thin in range(3):
        scales = [-1.5, -1.5, -1.5]
        scales[thin] = -5.0
        scene = one(scales)
        w, x, y, z = np.asarray(scene.quaternions[0]) / np.linalg.norm(scene.quaternions[0])
        axis = np.array([
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ])[:, thin]  # fmt: skip
        axis = -axis if axis @ np.asarray(scene.means[0]) > 0 else axis
        picture = render(scene, camera, with_normals=True)
        row, column = np.unravel_index(np.argmax(picture.alpha), picture.alpha.shape)
        found = picture.normals[row, column] / picture.alpha[row, column]
        np.testing.assert_allclose(found, axis, atol=1e-5)
