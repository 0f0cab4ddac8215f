"""The fast renderer against the dense one: pictures, gradients, adversarial scenes, overflow."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from see3d_jax.geometry.cameras import Camera, intrinsics_matrix, look_at
from see3d_jax.splatting import binning
from see3d_jax.splatting.gaussians import EMPTY_LOGIT, Gaussians
from see3d_jax.splatting.projection import project_gaussians
from see3d_jax.splatting.reference import render_dense
from see3d_jax.splatting.render import enough_capacity, render, render_within

# No multiple of 8 either way: the last tiles hang over the edge.
WIDTH, HEIGHT, COUNT = 45, 37, 60
CAPACITY = 1 << 13
CAMERA = Camera(
    intrinsics_matrix(40, 42, 22, 18), look_at((0.4, -0.3, -4), (0, 0, 0)), WIDTH, HEIGHT
)
GENERATOR = np.random.default_rng(5)
LOSS_WEIGHTS = GENERATOR.normal(size=(HEIGHT, WIDTH, 5)).astype(np.float32)


def random_scene(seed: int, log_scale: float = -1.8) -> Gaussians:
    rng = np.random.default_rng(seed)
    leaves = (
        rng.normal(size=(COUNT, 3)),
        rng.normal(log_scale, 0.7, (COUNT, 3)),
        rng.normal(size=(COUNT, 4)),
        rng.normal(0, 2, COUNT),
        rng.normal(0, 0.4, (COUNT, 16, 3)),
    )
    return Gaussians(*(jnp.asarray(leaf, jnp.float32) for leaf in leaves))


def with_values(scene: Gaussians, **fields) -> Gaussians:
    return dataclasses.replace(
        scene, **{name: jnp.asarray(value, jnp.float32) for name, value in fields.items()}
    )


def adversarial(kind: str) -> Gaussians:
    scene = random_scene(11)
    means, scales = np.array(scene.means), np.array(scene.log_scales)
    if kind == "behind and at the camera":
        means[:20, 2] = -6.0
        means[20:30] = CAMERA.position
    elif kind == "huge":
        scales[:10] = 2.5
    elif kind == "tiny":
        scales[:] = -9.0
    elif kind == "flat and needle":
        scales[:20, 0] = -12.0
        scales[20:40] = (1.0, -9.0, -9.0)
    elif kind == "at the edges":
        means[:30, 0] = np.where(np.arange(30) % 2, 2.6, -1.9)
        means[30:, 1] = np.where(np.arange(30) % 2, 2.0, -1.8)
    elif kind == "all layers on one pixel":
        means[:, :2] = 0.01 * means[:, :2]
    elif kind == "far away":
        means[:30] *= 1e6
    elif kind == "nothing to draw":
        return with_values(scene, opacity_logits=np.full(COUNT, EMPTY_LOGIT))
    return with_values(scene, means=means, log_scales=scales)


@pytest.fixture(scope="module")
def dense():
    """The reference in float64: needles and far scenes are beyond float32 with plain matrices."""
    compiled = jax.jit(render_dense)

    def draw(scene, camera, background):
        with jax.enable_x64(True):
            wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), (scene, camera))
            return jax.tree.map(np.asarray, compiled(*wide, background))

    return draw


def assert_same_picture(fast, slow) -> None:
    np.testing.assert_allclose(fast.rgb, slow.rgb, atol=1e-5)
    np.testing.assert_allclose(fast.alpha, slow.alpha, atol=1e-5)
    # depth sums planar z, so its rounding grows with the scene's depth
    reach = max(1.0, float(np.abs(slow.depth).max()))
    np.testing.assert_allclose(fast.depth / reach, slow.depth / reach, atol=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_picture_matches_the_dense_renderer(dense, seed):
    scene = random_scene(seed)
    assert_same_picture(render(scene, CAMERA, 0.3), dense(scene, CAMERA, 0.3))


@pytest.mark.parametrize(
    "kind",
    [
        "behind and at the camera", "huge", "tiny", "flat and needle", "at the edges",
        "all layers on one pixel", "far away", "nothing to draw",
    ],
)  # fmt: skip
def test_adversarial_scenes_match_too(dense, gradients, kind):
    scene = adversarial(kind)
    picture = render(scene, CAMERA, 0.3)
    assert_same_picture(picture, dense(scene, CAMERA, 0.3))
    if kind == "nothing to draw":
        np.testing.assert_allclose(picture.rgb, 0.3, atol=1e-6)
        assert int(picture.pair_count) == 0
    for leaf in jax.tree.leaves(gradients["fast"](scene, CAMERA, jnp.full(3, 0.3))):
        assert np.isfinite(leaf).all()


def scalar_loss(renderer):
    def loss(scene, camera, background):
        picture = renderer(scene, camera, background)
        maps = [picture.rgb, picture.depth[..., None], picture.alpha[..., None]]
        return (jnp.concatenate(maps, -1) * LOSS_WEIGHTS).sum()

    return loss


@pytest.fixture(scope="module")
def gradients():
    def fast(scene, camera, background):
        return render_within(scene, camera, CAPACITY, background)

    return {
        name: jax.jit(jax.grad(scalar_loss(renderer), argnums=(0, 1, 2)))
        for name, renderer in (("fast", fast), ("dense", render_dense))
    }


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_gradients_of_everything_match_dense_autodiff(gradients, seed):
    arguments = (random_scene(seed), CAMERA, jnp.array([0.2, 0.5, 0.8]))
    fast, slow = gradients["fast"](*arguments), gradients["dense"](*arguments)
    named = jax.tree_util.tree_leaves_with_path(fast)
    assert len(named) == 8  # five parameter groups, intrinsics, pose, background
    for (path, leaf), expected in zip(named, jax.tree.leaves(slow), strict=True):
        error = np.abs(leaf - expected).max() / np.abs(expected).max()
        assert error < 1e-3, f"{jax.tree_util.keystr(path)}: {error}"


def test_gradients_match_finite_differences_in_float64(gradients):
    """Along random directions in every group; the reference picture is computed in float64."""
    scene, background = random_scene(2), jnp.array([0.2, 0.5, 0.8])
    analytic = gradients["fast"](scene, CAMERA, background)
    assert_slopes_are_those_of(scalar_loss(render_dense), (scene, CAMERA, background), analytic)


def assert_slopes_are_those_of(loss, arguments, analytic, tolerance=1e-3) -> None:
    """Gradients against central differences of a loss in float64, in every leaf."""
    rng = np.random.default_rng(0)
    arguments = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), arguments)
    with jax.enable_x64(True):
        loss = jax.jit(loss)
        leaves, structure = jax.tree.flatten(arguments)
        for group, gradient in enumerate(jax.tree.leaves(analytic)):
            # Towards the gradient plus noise: a plain random direction is nearly level.
            direction = np.asarray(gradient, np.float64)
            direction = direction / np.linalg.norm(direction)
            direction = direction + 0.3 * rng.normal(size=direction.shape) / direction.size**0.5
            # The 1/255 cut makes the loss jump by tiny amounts: the median of several step sizes
            # does not see the few jumps that a step may cross.
            estimates = []
            for step in (1e-6, 1.7e-6, 3e-6, 5e-6, 1e-5):
                sides = []
                for sign in (1, -1):
                    moved = list(leaves)
                    moved[group] = leaves[group] + sign * step * direction
                    sides.append(float(loss(*jax.tree.unflatten(structure, moved))))
                estimates.append((sides[0] - sides[1]) / (2 * step))
            expected = float(np.median(estimates))
            actual = float((np.asarray(gradient, np.float64) * direction).sum())
            assert abs(actual - expected) < tolerance * abs(expected), f"group {group}"


def test_overflow_reports_the_true_count_and_render_still_draws_everything(dense):
    scene = adversarial("huge")
    cramped = jax.jit(render_within, static_argnums=2)(scene, CAMERA, 16)
    whole = render(scene, CAMERA, 0.0, capacity=16)
    assert int(cramped.pair_count) == int(whole.pair_count) > 16
    assert_same_picture(whole, dense(scene, CAMERA, 0.0))


@given(st.integers(1, 1 << 27))
def test_a_capacity_is_enough_but_wastes_little(pairs):
    capacity = enough_capacity(pairs)
    assert max(1024, pairs) <= capacity <= max(1024, pairs * 9 // 8)
    assert enough_capacity(capacity) == capacity


def test_lists_are_in_depth_order_also_when_tile_and_rank_need_two_keys():
    projected = jax.jit(project_gaussians)(random_scene(3), CAMERA)
    packed = jax.jit(binning.bin_gaussians, static_argnums=(1, 2, 3))(
        projected, WIDTH, HEIGHT, CAPACITY
    )
    tiles = jnp.array([3, 1, 3, 1 << 31 - 1], jnp.int32)
    ranks = jnp.array([1, 2, 0, 5], jnp.int32)
    tile, rank = binning._sort_pairs(tiles, ranks, 1 << 30, 1 << 20)
    assert tile[:3].tolist() == [1, 3, 3] and rank[:3].tolist() == [2, 0, 1]
    lengths = np.asarray(packed.length)
    assert lengths.sum() <= int(packed.pair_count)
    depth = np.asarray(projected.depths)[np.asarray(packed.gaussian)]
    for start, length in zip(np.asarray(packed.start), lengths, strict=True):
        assert (np.diff(depth[start : start + length]) >= 0).all()


@pytest.mark.parametrize("spare", [1.0, 1.3, 1.7, 2.2, 5.0])
def test_lists_are_the_same_however_generous_the_capacity(spare):
    projected = jax.jit(project_gaussians)(random_scene(3), CAMERA)
    build = jax.jit(binning.bin_gaussians, static_argnums=(1, 2, 3, 4, 5, 6))
    tight = build(projected, WIDTH, HEIGHT, CAPACITY, 0, 1, False)
    capacity = int(spare * int(tight.pair_count))
    lists = build(projected, WIDTH, HEIGHT, capacity, 0, 1, True)
    assert lists.gaussian.shape == (capacity,)
    used = int(tight.length.sum())
    np.testing.assert_array_equal(lists.gaussian[:used], tight.gaussian[:used])
    for name in ("start", "length", "pair_count"):
        np.testing.assert_array_equal(getattr(lists, name), getattr(tight, name))


@pytest.mark.parametrize("twins", [1, 3, 40])
def test_depth_ranks_are_those_of_a_stable_sort(twins):
    rng = np.random.default_rng(twins)
    depths = np.repeat(rng.uniform(1, 9, 200), twins).astype(np.float32)
    rng.shuffle(depths)
    drawn = rng.uniform(size=depths.size) < 0.8
    ranks = np.asarray(jax.jit(binning._depth_ranks)(drawn, depths))
    order = np.argsort(np.where(drawn, depths, np.inf), kind="stable")[: drawn.sum()]
    np.testing.assert_array_equal(ranks[order], np.arange(drawn.sum()))
    assert (ranks[~drawn] == depths.size).all()


BANDS = """
import jax, jax.numpy as jnp, numpy as np
from see3d_jax.splatting.processor import host_mesh
from see3d_jax.splatting.render import render_within
from tests.splatting import test_render as t

jax.config.update("jax_num_cpu_devices", 3)
mesh = host_mesh()
assert mesh.size == 3

def loss(scene, camera, mesh):
    picture = render_within(scene, camera, t.CAPACITY, 0.3, mesh=mesh)
    maps = [picture.rgb, picture.depth[..., None], picture.alpha[..., None]]
    return (jnp.concatenate(maps, -1) * t.LOSS_WEIGHTS).sum(), picture

gradient = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True), static_argnums=2)
for kind in ("", "huge"):
    scene = t.adversarial(kind)
    (split, banded), (whole, picture) = (gradient(scene, t.CAMERA, m) for m in (mesh, None))
    assert int(banded.pair_count) < int(picture.pair_count)
    for name in ("rgb", "depth", "alpha"):
        np.testing.assert_allclose(getattr(banded, name), getattr(picture, name), atol=1e-6)
    for one, other in zip(jax.tree.leaves(split), jax.tree.leaves(whole), strict=True):
        assert np.abs(one - other).max() <= 2e-5 * np.abs(other).max()
"""


FIT = """
import jax, jax.numpy as jnp, numpy as np
from see3d_jax.splatting import losses
from see3d_jax.splatting.processor import host_mesh, use_all_cores
from tests.splatting import test_fit_terms as t

use_all_cores(3)
mesh = host_mesh()
assert mesh.size == 3
rng = np.random.default_rng(0)
for height in (11, 12, 32, 37):  # windows: 1, 2, 22, 27
    image, truth = jnp.asarray(rng.uniform(size=(2, height, 20, 3)), jnp.float32)
    for weight in (None, jnp.asarray(rng.uniform(size=(height, 20)), jnp.float32)):
        one, three = (
            jax.jit(jax.value_and_grad(lambda i: losses.photometric_loss(i, truth, weight, 0.2, m)))
            (image) for m in (None, mesh)
        )
        for a, b in zip(one, three, strict=True):
            assert np.abs(a - b).max() <= 1e-6 * max(1.0, np.abs(a).max()), (height, weight is None)
# Without growth, for a Gaussian may be moved elsewhere for a rounding error.
config = t.FitConfig(steps=5, dropout=0.0, relocate_until=0.0)
one, three = (
    t.fit(t.views(), t.wall(250, 0.3), 3.0, config, progress=False, mesh=m) for m in (None, mesh)
)
np.testing.assert_allclose(one.losses, three.losses, rtol=1e-3)
"""


@pytest.mark.parametrize("program", [BANDS, FIT], ids=["bands", "fit"])
def test_several_devices_give_the_same_pictures_gradients_and_fits(program):
    """In a process of its own: devices can only be split before JAX starts."""
    root = Path(__file__).resolve().parents[2]
    subprocess.run([sys.executable, "-c", program], check=True, cwd=root, timeout=300)
