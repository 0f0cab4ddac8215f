"""Generation in rounds, paper Sec. 3.3: I_j = See3D(Î_j, M_j, {I_0, I_k}).

For the next m targets of the path, in turn:

    anchors   the generated views that make most of the targets known
    Î, M      warp of the references, and of what anchors generated themselves where no reference
              reaches; holes where something that nobody has seen yet may stand in front
    I         fill(Î, M, anchors): the model, or anything else that fills holes
    depth     of the warp where I agrees with it; elsewhere an estimate, aligned to it, and in the
              holes to what other views show of the same points (Eq. 4-6); none where neither can
              be trusted, so that errors do not travel on

References are never replaced, and at most 48 generated views are kept at work, so memory grows
with the result only. Each round is one file, whole or absent: a run that was killed goes on.
Images uint8 RGB [h, w, 3], masks bool with True = known, planar depth with 0 = unknown.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import jax.numpy as jnp
import numpy as np

from see3d_jax.files import atomic_path
from see3d_jax.geometry.cameras import Camera, stack
from see3d_jax.geometry.depth_align import align_depth
from see3d_jax.geometry.visibility import way_is_free
from see3d_jax.pipelines.coverage import choose_anchors
from see3d_jax.pipelines.matched_depth import (
    MOST,
    Keypoints,
    evenly_chosen,
    keypoint_depths,
    tie_holes,
)
from see3d_jax.pipelines.warps import View, resize_depth, warp_references

MAX_ANCHORS = 8  # warped into a round
_CANDIDATES = 48  # the newest generated views, from which anchors are chosen
_HIDES = 0.05  # relative: an anchor's surface this much nearer hides that of a reference
_FEWEST = 32  # keypoints that an alignment needs
_MATCHED_WITH = 4  # anchors, besides the new views themselves
_SAME_DEPTH = 0.05  # relative difference of depths that agree
_SAME_COLOUR = 40.0  # of 255, mean difference of a neighbourhood that shows the same
_TOO_WRONG = 0.5  # share of the known pixels: a view that disagrees in more is no anchor

Fill = Callable[[int, list[View], list[int], np.ndarray, np.ndarray], np.ndarray]
"""(number of the round, anchors, path indices [m], warps, masks) → views [m, h, w, 3] uint8."""


@dataclasses.dataclass(frozen=True)
class DepthEstimator:
    """Depth of new views.

    Attributes:
      estimate: (new views, existing views) → [m, h, w] float32 planar depth, 0 = unknown. The
        depth of the new views is still 0.
      has_scale: the estimate is in scene units; without, a view that shares too little with what
        exists to be aligned gets no depth.
    """

    estimate: Callable[[list[View], list[View]], np.ndarray]
    has_scale: bool


@dataclasses.dataclass(frozen=True)
class Round:
    """What one round made of its m targets.

    Attributes:
      generated, warps: [m, h, w, 3] uint8; masks: [m, h, w] bool; depths: [m, h, w], of the warp.
      trusted: [m, h, w] float32, the depth by which the views are warped on, 0 = not to be.
      report: plain JSON values: which views and anchors, shares of pixels, what was rejected.
    """

    generated: np.ndarray
    warps: np.ndarray
    masks: np.ndarray
    depths: np.ndarray
    trusted: np.ndarray
    report: dict[str, Any]


def run_rounds(
    references: list[View],
    targets: Camera,
    views_per_round: int,
    fill: Fill,
    estimator: DepthEstimator,
    *,
    folder: Path | None = None,
    settings: dict[str, Any] | None = None,
) -> list[Round]:
    """Runs through the targets [N] in order, `views_per_round` at a time.

    Finished rounds are kept in `folder` and found again there when references, targets and
    `settings` (JSON values; whatever else the result depends on) are the same; others are
    overwritten.
    """
    count = len(targets.intrinsics)
    fingerprint = _fingerprint(references, targets, {"m": views_per_round, **(settings or {})})
    rounds: list[Round] = []
    candidates: list[tuple[int, View]] = []
    resuming = folder is not None
    for number, start in enumerate(range(0, count, views_per_round)):
        indices = list(range(start, min(start + views_per_round, count)))
        file = folder and folder / f"{number:05d}.npz"
        done = _read_round(file, fingerprint) if resuming else None
        if done is None:
            resuming = False  # what follows an absent round was not made from this one
            last = indices[-1] == count - 1
            done = _one_round(
                number, indices, references, candidates, targets[np.array(indices)], fill,
                None if last else estimator,
            )  # fmt: skip
            if file is not None:
                _write_round(file, done, fingerprint)
        rounds.append(done)
        for i, index in enumerate(indices):
            image = np.where(done.masks[i][..., None], done.warps[i], done.generated[i])
            view = View(image, done.trusted[i], targets[index], ~done.masks[i])
            candidates.append((index, view))
        candidates = candidates[-_CANDIDATES:]
    return rounds


def _one_round(
    number: int, indices: list[int], references: list[View], candidates: list[tuple[int, View]],
    targets: Camera, fill: Fill, estimator: DepthEstimator | None,
) -> Round:  # fmt: skip
    usable = [(index, view) for index, view in candidates if view.depth.any()]
    chosen = choose_anchors(references, [view for _, view in usable], targets, MAX_ANCHORS)
    anchors = [usable[i][1] for i in chosen]
    warps, masks, depths, by_reference = warp_round(references, anchors, targets)
    generated = fill(number, anchors, indices, warps, masks)
    report: dict[str, Any] = {
        "views": indices,
        "anchors": [usable[i][0] for i in chosen],
        "known_share": round(float(masks.mean()), 4),
        "known_by_references": round(float(by_reference.mean()), 4),
    }
    trusted = np.zeros_like(depths)
    if estimator is not None:  # nothing follows the last round
        new = [
            View(np.where(mask[..., None], warp, image), nothing, targets[i])
            for i, (mask, warp, image, nothing) in enumerate(
                zip(masks, warps, generated, trusted, strict=True)
            )
        ]
        estimates = estimator.estimate(new, [*references, *anchors])
        # Depth with a scale is found from several views and needs no tie between them.
        matched: list[Keypoints] | list[None] = [None] * len(new)
        if not estimator.has_scale:
            matched = keypoint_depths(new, [*references, *anchors][:_MATCHED_WITH])
        details = []
        for i, (estimate, keypoints) in enumerate(zip(estimates, matched, strict=True)):
            trusted[i], detail = trusted_depth(
                generated[i],
                warps[i],
                masks[i],
                depths[i],
                estimate,
                estimator.has_scale,
                keypoints,
            )
            details.append(detail)
        report["depth"] = details
    return Round(generated, warps, masks, depths, trusted, report)


def warp_round(
    references: list[View], anchors: list[View], targets: Camera
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Warps, masks and depths [m, …] of one round, and which pixels references alone make known.

    References come first, for they are photographs; then what anchors show first hand. A surface
    clearly in front of what came before hides it all the same. What is seen through space that is
    hidden from all of them is not known (see `geometry.visibility`).
    """
    warps, masks, depths = warp_references(references, targets)
    by_reference = masks
    if anchors:
        # one number of sources is one compiled program; views without depth change nothing
        blank = dataclasses.replace(anchors[0], depth=np.zeros_like(anchors[0].depth))
        padded = [*anchors, *[blank] * (MAX_ANCHORS - len(anchors))]
        more, known, nearer = warp_references(padded, targets)
        take = known & (~masks | (nearer < depths * (1 - _HIDES)))
        warps = np.where(take[..., None], more, warps)
        depths = np.where(take, nearer, depths)
        masks, by_reference = masks | take, masks & ~take
        references = [*references, *padded]
    size = targets.width, targets.height
    free = np.asarray(
        way_is_free(
            depths, targets, np.stack([resize_depth(view.depth, *size) for view in references]),
            stack([view.camera.resized(*size) for view in references]),
        )
    )  # fmt: skip
    masks = masks & free
    warps, depths = np.where(masks[..., None], warps, 0), np.where(masks, depths, 0)
    return warps, masks, depths, by_reference & free


def trusted_depth(
    image: np.ndarray, warp: np.ndarray, mask: np.ndarray, warp_depth: np.ndarray,
    estimate: np.ndarray, has_scale: bool, matched: Keypoints | None = None,
) -> tuple[np.ndarray, dict[str, Any]]:  # fmt: skip
    """Depth by which a new view may be warped on: [h, w] float32, and a report.

    Known pixels keep the depth of the warp, if the new picture and the estimated depth agree with
    it there. In the holes the estimate counts, after alignment to the warp and to the `matched`
    points of the holes. A view that disagrees in more than half of what it should have kept is not
    trusted at all.
    """
    estimate = np.where(np.isfinite(estimate) & (estimate > 0), estimate, 0).astype(np.float32)
    aligned, keypoints = _aligned(estimate, mask, warp_depth)
    matches = 0
    if matched is not None:
        aligned, matches = tie_holes(estimate, aligned, mask, matched)
    if keypoints < _FEWEST and not matches and not has_scale:
        aligned = np.zeros_like(aligned)
    difference = np.abs(aligned - warp_depth) / np.maximum(warp_depth, 1e-9)
    agrees = (aligned <= 0) | (difference < _SAME_DEPTH)
    agrees &= _colour_difference(image, warp, mask) < _SAME_COLOUR
    rejected = float((mask & ~agrees).sum() / max(1, mask.sum()))
    depth = np.where(mask, np.where(agrees, warp_depth, 0), aligned).astype(np.float32)
    if rejected > _TOO_WRONG:
        depth = np.zeros_like(depth)
    holes = ~mask
    return depth, {
        "keypoints": keypoints,
        "matches": matches,
        "rejected_share": round(rejected, 4),
        "holes_with_depth": round(float((depth[holes] > 0).mean()), 4) if holes.any() else None,
    }


def _aligned(
    estimate: np.ndarray, mask: np.ndarray, warp_depth: np.ndarray
) -> tuple[np.ndarray, int]:
    """The estimate brought to the depth of the warp, and how many keypoints it was done with.

    Known pixels, evenly chosen, are the keypoints: what the warp says of their depth is what the
    anchors say. With too few of them the estimate comes back as it is.
    """
    usable = mask & (warp_depth > 0) & (estimate > 0)
    count = min(int(usable.sum()), MOST)
    if count < _FEWEST:
        return estimate, count
    known = evenly_chosen(usable, warp_depth)
    return np.asarray(align_depth(jnp.asarray(estimate), known.pixels, known.depths).depth), count


def _colour_difference(image: np.ndarray, warp: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """[h, w] mean difference, 0 to 255, over the known pixels of a 5 × 5 neighbourhood."""
    known = mask.astype(np.float32)
    difference = np.abs(image.astype(np.float32) - warp).mean(-1) * known
    total, weight = (cv2.boxFilter(v, -1, (5, 5), normalize=False) for v in (difference, known))
    return total / np.maximum(weight, 1)


# --- rounds on disk -----------------------------------------------------------------------------


def _fingerprint(references: list[View], targets: Camera, settings: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    cameras = [targets, *(view.camera for view in references)]
    arrays = [np.asarray(part) for c in cameras for part in (c.intrinsics, c.world_to_camera)]
    for array in (*arrays, *(part for view in references for part in (view.image, view.depth))):
        digest.update(str(array.shape).encode() + np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _write_round(file: Path, done: Round, fingerprint: str) -> None:
    arrays = {name: value for name, value in vars(done).items() if name != "report"}
    with atomic_path(file) as temporary:
        np.savez_compressed(
            temporary, report=json.dumps(done.report), fingerprint=fingerprint, **arrays
        )


def _read_round(file: Path, fingerprint: str) -> Round | None:
    """The round in the file, None when there is none, or one of another run."""
    try:
        with np.load(file, allow_pickle=False) as content:
            if str(content["fingerprint"]) != fingerprint:
                return None
            names = [field.name for field in dataclasses.fields(Round) if field.name != "report"]
            report = json.loads(str(content["report"]))
            return Round(**{name: content[name] for name in names}, report=report)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
