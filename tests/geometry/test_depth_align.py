"""Alignment of estimated depth: exact without noise, robust with it, harmless without keypoints."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from see3d_jax.geometry.cameras import Camera, intrinsics_matrix, look_at, project, stack, unproject
from see3d_jax.geometry.depth_align import align_depth, fit_global, guide_keypoints

H, W, KEYPOINTS = 72, 96, 400
K = intrinsics_matrix(80, 80, W / 2, H / 2)
NEW = Camera(K, look_at((0, 0, 0), (0, 0, 3)), W, H)
ANCHORS = stack([Camera(K, look_at((x, 0.1, 0), (0, 0, 3)), W, H) for x in (-0.5, 0.6, 0.3)])


def _scene(seed: int = 0):
    """Depth of a curved wall with a box before it, keypoints with exact matches in the anchors."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:H, :W]
    depth = 3 + 0.6 * np.sin(x / 25) + 0.01 * y
    depth = np.where((abs(x - 50) < 14) & (abs(y - 36) < 14), 1.8, depth).astype(np.float32)
    column, row = rng.integers(0, W, KEYPOINTS), rng.integers(0, H, KEYPOINTS)
    pixels = np.stack([column, row], -1).astype(np.float32) + 0.5
    points = np.asarray(unproject(NEW, pixels, depth[row, column]))
    matches = np.stack([np.asarray(project(ANCHORS[i], points)[0]) for i in range(3)])
    return depth, depth[row, column], pixels, matches, np.ones((3, KEYPOINTS), bool)


def test_exact_matches_give_exact_depth():
    _, truth, pixels, matches, matched = _scene()
    guided = guide_keypoints(NEW, ANCHORS, pixels, matches, matched)
    assert np.all(np.asarray(guided.valid) == 1)
    np.testing.assert_allclose(guided.depth, truth, rtol=2e-4)


def test_one_wrong_match_of_three_is_found():
    _, truth, pixels, matches, matched = _scene()
    matches[1, :100] += 15
    guided = guide_keypoints(NEW, ANCHORS, pixels, matches, matched)
    np.testing.assert_allclose(guided.depth, truth, rtol=5e-3)
    support = np.asarray(guided.support)
    assert support[1, :100].sum() == 0 and support[[0, 2]].all()


def test_deviation_is_that_of_the_errors():
    _, truth, pixels, matches, matched = _scene()
    noise = np.random.default_rng(1).normal(0, 0.5, matches.shape).astype(np.float32)
    guided = guide_keypoints(NEW, ANCHORS, pixels, matches + noise, matched, 0.5)
    standard = (np.asarray(guided.depth) / truth - 1) / np.asarray(guided.deviation)
    assert 0.8 < np.sqrt(np.mean(np.clip(standard, -4, 4) ** 2)) < 1.3


def test_no_match_no_depth_and_no_nan():
    depth, _, pixels, matches, matched = _scene()
    guided = guide_keypoints(NEW, ANCHORS, pixels, matches, np.zeros_like(matched))
    assert np.asarray(guided.valid).sum() == 0
    depth[:4] = np.nan
    aligned = align_depth(depth, pixels, guided)
    assert float(aligned.scale) == 1 and float(aligned.shift) == 0
    np.testing.assert_allclose(np.asarray(aligned.depth)[4:], depth[4:], rtol=1e-5)
    assert np.all(np.asarray(aligned.depth)[:4] == 0)


def test_an_anchor_without_parallax_does_not_decide():
    """A pure rotation says nothing about depth: its deviation must say so."""
    _, _, pixels, _matches, matched = _scene()
    guided = guide_keypoints(NEW, stack([NEW]), pixels, pixels[None] + 0.1, matched[:1])
    assert np.all((np.asarray(guided.valid) == 0) | (np.asarray(guided.deviation) > 1))


def test_affine_distortion_is_undone():
    depth, _, pixels, matches, matched = _scene()
    guided = guide_keypoints(NEW, ANCHORS, pixels, matches, matched)
    aligned = align_depth(0.4 * depth + 0.7, pixels, guided)
    np.testing.assert_allclose(aligned.depth, depth, rtol=5e-3)
    assert abs(float(aligned.scale) - 2.5) < 0.02


def test_noise_and_outliers_under_a_smooth_distortion():
    depth, _, pixels, matches, matched = _scene()
    rng = np.random.default_rng(3)
    matches = matches + rng.normal(0, 0.3, matches.shape)
    wrong = rng.random(matched.shape) < 0.2
    matches = np.where(wrong[..., None], rng.random(matches.shape) * [W, H], matches)
    guided = guide_keypoints(NEW, ANCHORS, pixels, matches.astype(np.float32), matched, 0.3)
    y, x = np.mgrid[:H, :W]
    estimate = (0.5 * depth**0.7 * (1 + 0.2 * np.sin(x / 15) * np.cos(y / 20)) + 0.2).astype("f4")
    column, row = pixels.astype(int).T
    scale, shift = fit_global(estimate[row, column], guided, jax.random.key(0))
    single = np.median(abs(np.asarray(scale * estimate + shift) / depth - 1))
    ours = np.median(abs(np.asarray(align_depth(estimate, pixels, guided).depth) / depth - 1))
    assert ours < 0.02 and ours < single / 3


def test_few_keypoints_fall_back_to_a_scale():
    depth, truth, pixels, matches, matched = _scene()
    guided = guide_keypoints(NEW, ANCHORS, pixels[:1], matches[:, :1], matched[:, :1])
    aligned = np.asarray(align_depth(0.5 * depth, pixels[:1], guided).depth)
    np.testing.assert_allclose(aligned, depth, rtol=1e-3)
    assert truth[0] > 0


def test_shapes_are_checked():
    depth, _, pixels, matches, matched = _scene()
    with pytest.raises(ValueError, match="anchor_pixels"):
        guide_keypoints(NEW, ANCHORS, pixels[:-1], matches, matched)
    guided = guide_keypoints(NEW, ANCHORS, pixels, matches, matched)
    with pytest.raises(ValueError, match="expected depth"):
        align_depth(depth[None], pixels, guided)
