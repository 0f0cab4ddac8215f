"""Holes filled under a multi-scale prior: exact where it must be, closer to photos than Telea."""

import cv2
import jax.numpy as jnp
import numpy as np
import pytest
import skimage.data

from see3d_jax.data.inpainting import inpaint
from see3d_jax.data.masks import random_mask
from see3d_jax.diffusion.hole_fill import fill_holes


@pytest.mark.parametrize("size", [(1, 1), (7, 5), (16, 24)])
def test_known_pixels_stay_and_a_constant_goes_on(size):
    rng = np.random.default_rng(0)
    known = (rng.random((2, *size, 1)) < 0.3).astype(np.float32)
    known[:, 0, 0] = 1
    images = rng.standard_normal((2, *size, 3)).astype(np.float32)
    filled = np.asarray(fill_holes(jnp.asarray(images), jnp.asarray(known)))
    assert np.array_equal(filled[known[..., 0] > 0], images[known[..., 0] > 0])
    constant = np.where(known > 0, np.float32(0.25), np.float32(np.nan))
    np.testing.assert_allclose(fill_holes(constant, known), 0.25, atol=1e-6)


def test_an_image_without_a_known_pixel_is_zero():
    filled = fill_holes(jnp.full((1, 2, 8, 8, 3), -1.0), jnp.zeros((1, 2, 8, 8, 1)))
    assert not np.any(filled)


def test_the_posterior_of_a_tree_is_found():
    """One row of a 2 × 2 image is known: its parent's posterior by hand."""
    images = jnp.array([[[1.0], [3.0]], [[0.0], [0.0]]])[None]
    known = jnp.array([[[1.0], [1.0]], [[0.0], [0.0]]])[None]
    # Two children that differ from the parent with variance one each: their mean.
    np.testing.assert_allclose(fill_holes(images, known)[0, 1], [[2.0], [2.0]], atol=1e-5)


def test_it_is_closer_to_photos_than_telea():
    rng = np.random.default_rng(1)
    photos = [skimage.data.astronaut(), skimage.data.coffee(), skimage.data.chelsea()]
    truth = np.stack([cv2.resize(p, (96, 96), interpolation=cv2.INTER_AREA) for p in photos])
    truth = np.repeat(truth, 4, 0).astype(np.float32) / 255
    known = np.stack([random_mask(rng, 96, 96, (0.2, 0.7)) for _ in truth])
    filled = np.asarray(fill_holes(jnp.asarray(truth), jnp.asarray(known)))
    telea = inpaint(truth, known[..., 0] > 0.5)
    holes = np.broadcast_to(known < 0.5, truth.shape)
    error, error_telea = (np.mean((x - truth)[holes] ** 2) for x in (filled, telea))
    assert error < 0.95 * error_telea
