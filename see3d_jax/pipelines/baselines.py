"""What generated views are measured with, and against: baselines that need no model, and scores.

A generated view is worth something only if it beats what costs nothing: the raw warp, the warp
filled by classic inpainting, and the nearest photo. Images are uint8 RGB [h, w, 3], masks bool with
True = known pixel of the warp.
"""

from __future__ import annotations

import math
from typing import Any

import cv2
import numpy as np

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
    have such pixels, None when no view has; the SSIM of a region is that of the windows centred in
    it. Returns {"num_views", "hole_share", "methods": {name: {region: {"psnr", "ssim"}}}}.
    """
    regions = {"all": np.ones_like(masks), "known": masks, "hole": ~masks}
    methods: dict[str, Any] = {}
    for name, images in candidates.items():
        sums = {region: {"psnr": [], "ssim": []} for region in regions}
        for image, true_image, *chosen in zip(images, truth, *regions.values(), strict=True):
            pair = image / np.float32(255), true_image / np.float32(255)
            for region, mask in zip(regions, chosen, strict=True):
                if not mask.any():
                    continue
                sums[region]["psnr"].append(min(100.0, float(psnr(*pair, mask))))
                similarity = float(ssim(*pair, mask))
                if math.isfinite(similarity):  # NaN: the region lies in the border only
                    sums[region]["ssim"].append(similarity)
        methods[name] = {
            region: {
                metric: round(float(np.mean(values)), 4) if values else None
                for metric, values in both.items()
            }
            for region, both in sums.items()
        }
    return {
        "num_views": len(truth),
        "hole_share": round(float(1 - masks.mean()), 4),
        "methods": methods,
    }
