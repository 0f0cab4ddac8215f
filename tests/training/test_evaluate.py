"""The held-out numbers: what they compare, and that they are what they say."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_training import minuscule

from see3d_jax.data.inpainting import inpaint
from see3d_jax.diffusion.loss import diffusion_loss, draw_loss_noise
from see3d_jax.diffusion.precondition import precondition
from see3d_jax.errors import InputError
from see3d_jax.evaluation.lpips import Lpips, lpips_shapes
from see3d_jax.models.weights import apply_unet, init_unet
from see3d_jax.training import evaluate, inputs, settings, sharding
from see3d_jax.training.state import Frozen

NUMBERS = ("psnr", "ssim", "psnr_known", "psnr_hole")


def batch_of(side=16, views=3, rows=2):
    """Views that get brighter with time; the left half of every target is missing."""
    rng = np.random.default_rng(0)
    scene = rng.uniform(-0.5, 0.5, (rows, 1, side, side, 3)).astype(np.float32)
    frame = np.tile(np.array([4, 5, 0], np.int32)[:views], (rows, 1))
    mask = np.ones((rows, views, side, side, 1), np.float32)
    mask[:, 1:, :, : side // 2] = 0
    return {
        "image": scene + frame[:, :, None, None, None].astype(np.float32) / 20,
        "mask": mask,
        "is_reference": np.tile(np.arange(views) == 0, (rows, 1)),
        "frame": frame,
    }


def test_a_perfect_prediction_beats_every_baseline():
    batch = batch_of()
    scores = evaluate.score(batch, batch["image"])
    assert scores.keys() == {
        f"heldout_{number}{method}"
        for number in NUMBERS
        for method in ("", "_copy", "_condition", "_inpainted")
    }
    assert scores["heldout_psnr"] == scores["heldout_psnr_hole"] == 100.0
    assert scores["heldout_ssim"] == pytest.approx(1.0)
    for method in ("_copy", "_condition", "_inpainted"):
        assert scores[f"heldout_psnr{method}"] < 60


def test_each_number_looks_at_its_own_pixels():
    batch = batch_of()
    predicted = batch["image"].copy()
    predicted[:, 1:, :, :8] += 0.2  # wrong by a tenth of the range, in the holes only
    predicted[:, 0] = 1.0  # references do not count
    scores = evaluate.score(batch, predicted)
    assert scores["heldout_psnr_hole"] == pytest.approx(20.0, abs=1e-3)
    assert scores["heldout_psnr_known"] == 100.0
    assert scores["heldout_psnr"] == pytest.approx(20 + 10 * np.log10(2), abs=1e-3)
    # The copy of the reference is off by 1 and by 4 twentieths, of a range of 2.
    expected = np.mean([-20 * np.log10(1 / 40), -20 * np.log10(4 / 40)])
    assert scores["heldout_psnr_copy"] == pytest.approx(expected, abs=1e-3)
    assert scores["heldout_psnr_known_condition"] == 100.0
    assert scores["heldout_psnr_hole_inpainted"] > scores["heldout_psnr_hole_condition"]


def test_views_without_holes_have_no_numbers_of_holes():
    batch = batch_of()
    batch["mask"][:] = 1
    batch["warped"] = batch["image"] * 0.5  # as coarse views are: something else than the truth
    scores = evaluate.score(batch, batch["image"])
    assert not any("hole" in name or "inpainted" in name for name in scores)
    assert scores["heldout_psnr_condition"] < 30


def test_lpips_is_added_when_a_network_is_given():
    shapes = lpips_shapes("alex")
    rng = np.random.default_rng(0)
    kernels = [0.02 * rng.standard_normal(s).astype(np.float32) for s in shapes.kernels]
    biases, heads = ([np.ones(s, np.float32) for s in x] for x in (shapes.biases, shapes.heads))
    batch = batch_of(side=32, rows=1)
    network = Lpips(kernels, biases, heads, "alex")
    scores = evaluate.score(batch, batch["image"], network)
    assert scores["heldout_lpips"] == pytest.approx(0, abs=1e-6)
    assert scores["heldout_lpips_condition"] > scores["heldout_lpips_copy"] > 0


def test_the_picture_shows_the_first_target_of_each_clip():
    batch = batch_of()
    picture = evaluate.sample_grid(batch, np.zeros_like(batch["image"]))
    assert picture.dtype == np.uint8 and picture.ndim == 3
    other = evaluate.sample_grid(batch, np.ones_like(batch["image"]))
    assert (picture != other).any()


def test_the_loss_of_a_range_of_timesteps_is_the_training_loss_there():
    config = minuscule("unused")
    spec, schedule = settings.train_spec(config), settings.noise_schedule(config)
    frozen = Frozen(settings.codec(config, spec.unet))
    rng = np.random.default_rng(1)
    params = jax.tree.map(
        lambda x: x + 0.05 * rng.standard_normal(x.shape, np.float32), init_unet(spec.unet, 0)
    )
    batch, key, mesh = batch_of(), jax.random.key(0), sharding.make_mesh(config)
    found = evaluate.target_errors(
        params, batch, frozen, schedule, key, spec=spec, mesh=mesh, buckets=4, rows=2
    )

    x_0, condition, mask = inputs.encode_batch(frozen.codec, batch, spec.objective.preconditioning)
    noise = draw_loss_noise(
        key, jnp.arange(2), jnp.arange(3), x_0.shape[2:], num_timesteps=1000, drop_probability=0.0
    )
    context = jnp.zeros((2, 3, spec.context_tokens, spec.unet.context_dim))

    denoise = precondition(
        functools.partial(apply_unet, spec.unet, params),
        spec.objective.preconditioning, schedule, frozen.codec.deviation, form="code", beta=0.2,
    )  # fmt: skip

    @jax.jit
    def loss_there():  # in the third quarter of 1000 timesteps, two rows at even distances
        return diffusion_loss(
            denoise, schedule, x_0, condition, mask,
            jnp.asarray(batch["is_reference"]), context, noise.replace(t=jnp.array([562, 687])),
        )[0]  # fmt: skip

    assert found.shape == (2, 4)
    targets = (~batch["is_reference"]).sum()
    assert float(found[:, 2].sum()) / targets == pytest.approx(float(loss_there()), rel=1e-5)
    assert len(set(np.asarray(found).ravel().tolist())) == 8


def test_inpainting_keeps_what_is_known_and_fills_the_rest():
    images = np.full((2, 12, 12, 3), 0.4, np.float32)
    known = np.ones((2, 12, 12), bool)
    known[0, 3:9, 3:9] = False
    images[0][~known[0]] = 0
    known[1] = False
    filled = inpaint(images, known)
    np.testing.assert_allclose(filled[0], 0.4, atol=3 / 255)
    np.testing.assert_allclose(filled[1], 127 / 255)


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"evaluation.loss_buckets": 0}, r"config\.evaluation\.loss_buckets: want 1 to 100"),
        ({"evaluation.sampler_steps": 0}, r"config\.evaluation: num_steps"),
        ({"evaluation.lpips": "squeeze"}, r"LPIPS network 'squeeze'"),
    ],
)
def test_what_cannot_be_measured_is_named(overrides, message):
    config = minuscule("unused", **overrides)
    with pytest.raises(InputError, match=message):
        settings.evaluation(config)
        settings.perceptual(config)
