"""Depths of points that new views share with each other and with what exists, paper Eq. 4.

In the known pixels of a new view the warp says how deep they are. In its holes nothing does but
what the view has in common with other views: there an estimated depth map, which a network bends
differently in every view, is tied to the others by matches.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from see3d_jax.geometry.cameras import stack
from see3d_jax.geometry.depth_align import REACH, GuidedDepths, align_depth, guide_keypoints
from see3d_jax.pipelines.matching import match_features, sift_features
from see3d_jax.pipelines.warps import View

_NOISE = 0.25  # standard deviation of a SIFT match, pixels
_UNSURE = 0.1  # relative deviation of a depth that is of no use
_FEWEST = 32  # matches in the holes that tell anything
_GAIN = 0.8  # of the error at matches: what may be left for them to count
MOST = 1024  # keypoints of a view: one number of them is one compiled program


@dataclasses.dataclass(frozen=True)
class Keypoints:
    """[MOST] points of one view and their depths in scene units; `depths.valid` 0 = padding.

    Attributes:
      pixels: [MOST, 2] float32, centres at +0.5.
      depths: what the matches say.
    """

    pixels: jax.Array
    depths: GuidedDepths


def keypoint_depths(new: list[View], existing: list[View]) -> list[Keypoints]:
    """Of each new view, the points that others show as well, at the depth that explains where.

    A point is matched in all other new views and in `existing` ones. Views that are no view of the
    same scene do no harm: a match that no depth explains is dropped (see `guide_keypoints`).
    """
    everything = [*new, *existing]
    features = [sift_features(view.image) for view in everything]
    pairs = {
        (i, j): match_features(features[i], features[j])
        for i in range(len(new))
        for j in range(i + 1, len(everything))
    }
    found = []
    for i, view in enumerate(new):
        others = [j for j in range(len(everything)) if j != i]
        sides = [
            (pairs[i, j].first, pairs[i, j].second)
            if j > i
            else (pairs[j, i].second, pairs[j, i].first)
            for j in others
        ]
        points, index = np.unique(
            np.concatenate([here for here, _ in sides]), axis=0, return_inverse=True
        )
        # A fixed shuffle, for sorted points are those of one side of the picture.
        place = np.argsort(np.random.default_rng(0).permutation(len(points)))[index.reshape(-1)]
        there = np.zeros((len(others), MOST, 2), np.float32)
        matched = np.zeros((len(others), MOST), bool)
        pixels = np.zeros((MOST, 2), np.float32)
        start = 0
        for row, (here, seen) in enumerate(sides):
            at = place[start : start + len(here)]
            start += len(here)
            kept = at < MOST
            pixels[at[kept]], there[row, at[kept]] = here[kept], seen[kept]
            matched[row, at[kept]] = True
        cameras = stack([everything[j].camera for j in others])
        depths = guide_keypoints(
            view.camera,
            cameras,
            jnp.asarray(pixels),
            jnp.asarray(there),
            jnp.asarray(matched),
            noise=_NOISE,
        )
        found.append(Keypoints(jnp.asarray(pixels), depths))
    return found


def evenly_chosen(where: np.ndarray, depth: np.ndarray) -> Keypoints:
    """Up to MOST pixels of the mask `where` [h, w] as keypoints at planar `depth` [h, w]."""
    places = np.argwhere(where)
    # Every k-th pixel in reading order would lie on columns; a fixed shuffle does not.
    places = places[np.random.default_rng(0).permutation(len(places))[:MOST]]
    rows, columns = np.resize(places, (MOST, 2)).T if len(places) else np.zeros((2, MOST), int)
    chosen = np.arange(MOST) < len(places)
    valid = jnp.asarray(chosen, jnp.float32)
    depths = jnp.asarray(np.where(chosen, depth[rows, columns], 1), jnp.float32)
    pixels = jnp.asarray(np.stack([columns, rows], -1) + 0.5, jnp.float32)
    return Keypoints(pixels, GuidedDepths(depths, jnp.full(MOST, 0.01), valid, valid[None]))


def tie_holes(
    estimate: np.ndarray, depth: np.ndarray, mask: np.ndarray, points: Keypoints
) -> tuple[np.ndarray, int]:
    """Aligns an estimate to what matches say in the holes as well, if they say something.

    Matches are noisy, and depth that is right already must not follow them. So what is left at
    each match when it has no say counts, and must be clearly less than without all of them.

    Args:
      estimate: [h, w] planar depth, 0 = unknown.
      depth: the same, aligned to what is known: right where `mask` is True.
      mask: [h, w] bool.
      points: keypoints of the same view.

    Returns the depth, and the number of matches that it follows: 0 = it is `depth` unchanged.
    """
    pixels = np.asarray(points.pixels)
    column, row = (
        np.clip(x.astype(int), 0, side - 1) for x, side in zip(pixels.T, depth.shape[::-1])
    )
    says, deviation = np.asarray(points.depths.depth), np.asarray(points.depths.deviation)
    here = (np.asarray(points.depths.valid) > 0) & (deviation < _UNSURE)
    here &= ~mask[row, column] & (depth[row, column] > 0)
    count = int(here.sum())
    if count < _FEWEST:
        return depth, 0
    held = evenly_chosen(mask & (depth > 0), depth)  # stay where they are
    valid = jnp.concatenate([jnp.asarray(here, jnp.float32), held.depths.valid])
    guided = GuidedDepths(
        jnp.concatenate([points.depths.depth, held.depths.depth]),
        jnp.concatenate([points.depths.deviation, held.depths.deviation]),
        valid, valid[None],
    )  # fmt: skip
    places = jnp.concatenate([points.pixels, held.pixels])
    before = np.median(np.abs(says[here] / depth[row, column][here] - 1))
    coarse, fine = (REACH * math.sqrt(x) for x in ((~mask).sum() / count, mask.size / MOST))
    tied = align_depth(jnp.asarray(estimate), places, guided, bandwidth=coarse)
    if np.median(np.abs(np.asarray(tied.error))[:MOST][here]) > _GAIN * before:
        return depth, 0
    tied = align_depth(tied.depth, places, guided, bandwidth=fine)
    return np.asarray(tied.depth), count
