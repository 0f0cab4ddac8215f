"""PSNR and SSIM against scikit-image, and what masks do."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from skimage import data
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from see3d_jax.evaluation.metrics import psnr, ssim


@pytest.fixture(scope="module")
def pair() -> tuple[np.ndarray, np.ndarray]:
    photo = data.astronaut()[60:140, 150:260].astype(np.float32) / 255
    noise = np.random.default_rng(0).normal(0, 0.08, photo.shape)
    return photo, np.clip(photo + noise, 0, 1).astype(np.float32)


def test_both_agree_with_scikit_image(pair):
    photo, noisy = pair
    assert float(psnr(noisy, photo)) == pytest.approx(
        peak_signal_noise_ratio(photo, noisy, data_range=1), abs=1e-4
    )
    expected = structural_similarity(
        photo, noisy, channel_axis=-1, data_range=1, gaussian_weights=True, sigma=1.5,
        use_sample_covariance=False,
    )  # fmt: skip
    assert float(ssim(noisy, photo)) == pytest.approx(expected, abs=1e-5)


def test_equal_images_are_perfect_and_batches_keep_their_shape(pair):
    photo, noisy = pair
    assert np.isinf(psnr(photo, photo)) and float(ssim(photo, photo)) == pytest.approx(1)
    batch = np.stack([[photo, noisy, noisy]] * 2)
    np.testing.assert_allclose(psnr(batch, batch[:, ::-1])[0, 0], psnr(photo, noisy), rtol=1e-5)
    assert ssim(batch, batch[:, ::-1]).shape == (2, 3)


def test_a_mask_looks_only_at_its_pixels(pair):
    photo, noisy = pair
    mask = np.zeros(photo.shape[:2], bool)
    mask[:, :50] = True
    spoiled = noisy.copy()
    spoiled[:, 50:] = 0
    assert float(psnr(spoiled, photo, mask)) == pytest.approx(
        float(psnr(noisy[:, :50], photo[:, :50])), abs=1e-4
    )
    spoiled[:, 50:] = noisy[:, 50:]
    spoiled[:, 70:] = 0  # beyond the reach of windows centred inside the mask
    assert float(ssim(spoiled, photo, mask[..., None])) == pytest.approx(
        float(ssim(noisy, photo, mask)), abs=1e-5
    )
    assert np.isnan(psnr(noisy, photo, np.zeros_like(mask)))


def test_gradient_of_ssim_matches_finite_differences(pair):
    photo, noisy = (image[:20, :24] for image in pair)
    direction = np.random.default_rng(1).normal(size=noisy.shape).astype(np.float32)
    gradient = jax.jit(jax.grad(ssim))(noisy, photo)
    with jax.enable_x64(True):
        wide, compiled, step = noisy.astype(np.float64), jax.jit(ssim), 1e-5
        sides = [compiled(wide + s * step * direction, photo.astype(np.float64)) for s in (1, -1)]
    expected = float(sides[0] - sides[1]) / (2 * step)
    assert float((gradient * direction).sum()) == pytest.approx(expected, rel=1e-3)


def test_images_too_small_or_unequal_are_refused(pair):
    photo, noisy = pair
    with pytest.raises(ValueError, match="11"):
        ssim(photo[:10], noisy[:10])
    with pytest.raises(ValueError, match="two images"):
        ssim(photo, noisy[:-1])
