"""What generated views are measured with, and against: baselines that need no model, and scores.

A generated view is worth something only if it beats what costs nothing: the raw warp, the warp
filled by classic inpainting, and the nearest photo. Images are uint8 RGB [h, w, 3], masks bool with
True = known pixel of the warp.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np

from see3d_jax.evaluation.lpips import Lpips, lpips
from see3d_jax.evaluation.metrics import psnr, ssim
from see3d_jax.geometry.cameras import Camera


def nearest_reference(targets: Camera, references: Camera) -> np.ndarray:
    """[N] index of the reference that looks most like each target: near, and the same way.

    One unit of distance is the largest distance between any two of these cameras; one unit of
    direction is the angle in radians.
    """
    eye, eye_ref = np.asarray(targets.position), np.asarray(references.position)
    distance = np.linalg.norm(eye[:, None] - eye_ref[None], axis=-1)
    forward, forward_ref = (np.asarray(c.world_to_camera)[:, 2, :3] for c in (targets, references))
    angle = np.arccos(np.clip(forward @ forward_ref.T, -1, 1))
    return np.argmin(distance / max(distance.max(), 1e-9) + angle, axis=1)


def inpaint(warp: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The warp with its holes filled by OpenCV's Telea method: the baseline that needs no model."""
    if not mask.any():
        return np.full_like(warp, 127)
    return cv2.inpaint(warp, np.where(mask, 0, 255).astype(np.uint8), 3, cv2.INPAINT_TELEA)


def score(
    truth: np.ndarray, masks: np.ndarray, candidates: dict[str, np.ndarray]
) -> dict[str, Any]:
    """PSNR (dB, at most 100) and SSIM of each candidate, on all, known and hole pixels.

    All images [N, h, w, 3] uint8, masks [N, h, w] bool. A number is the mean over the views that
    have such pixels, None when no view has. Returns {"num_views", "hole_share", "methods": {name:
    {region: {"psnr", "ssim"}}}}.
    """
    regions = {"all": np.ones_like(masks), "known": masks, "hole": ~masks}
    methods = {
        name: {
            region: {
                metric: round(float(np.mean(known)), 4) if (known := _given(values)) else None
                for metric, values in metrics.items()
            }
            for region, metrics in score_views(truth, regions, images).items()
        }
        for name, images in candidates.items()
    }
    return {
        "num_views": len(truth),
        "hole_share": round(float(1 - masks.mean()), 4),
        "methods": methods,
    }


def score_views(
    truth: np.ndarray,
    regions: dict[str, np.ndarray],
    images: np.ndarray,
    networks: Sequence[Lpips] = (),
) -> dict[str, dict[str, list[float | None]]]:
    """Scores of each view in each region: {region: {metric: N numbers, None = not defined}}.

    `truth` and `images` [N, h, w, 3] uint8, regions [N, h, w] bool, True = counts. The metrics are
    "psnr" (dB, at most 100), "ssim" (of the windows centred in the region) and, for each network,
    "lpips_alex" or "lpips_vgg": there, the pixels outside the region are those of the truth, so it
    grows with the share of the region. None: the view has no such pixel, or (SSIM) only at the rim.
    """
    names = ("psnr", "ssim", *(f"lpips_{network.network}" for network in networks))
    scores = {region: {name: [] for name in names} for region in regions}
    for view, (image, true_image) in enumerate(zip(images, truth, strict=True)):
        pair = image / np.float32(255), true_image / np.float32(255)
        for region, masks in regions.items():
            mask, kept = masks[view], scores[region]
            if not mask.any():
                for name in names:
                    kept[name].append(None)
                continue
            kept["psnr"].append(min(100.0, float(psnr(*pair, mask))))
            similarity = float(ssim(*pair, mask))
            kept["ssim"].append(similarity if math.isfinite(similarity) else None)
            shown = pair[0] if mask.all() else np.where(mask[..., None], *pair)
            for network in networks:
                distance = float(lpips(network, shown, pair[1]))
                kept[f"lpips_{network.network}"].append(distance)
    return scores


def _given(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None]
