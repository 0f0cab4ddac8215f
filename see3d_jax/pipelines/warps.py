"""Warps of the references to target cameras, antialiased, with a mask of what is known.

Images are uint8 RGB [h, w, 3], masks bool with True = known, depth planar z with 0 = unknown.
"""

from __future__ import annotations

import numpy as np
from tqdm import tqdm

from see3d_jax.geometry.cameras import Camera, stack
from see3d_jax.geometry.warping import warp_views

SUPERSAMPLE = 4  # references are warped at up to this many times the working size
_KNOWN_SHARE = 0.9  # of a pixel; the released code thresholds its warp masks there, too


def warp_references(
    images: list[np.ndarray], depths: list[np.ndarray], cameras: list[Camera], targets: Camera
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Warps the references to every target, merged by z-buffer.

    References may be larger than the targets: then each target is warped at up to 4 times its size
    and averaged, so that textures do not alias. A pixel is known when more than 0.9 of it is.

    Args:
      images, depths, cameras: the R references, all of one size.
      targets: batch [N].

    Returns:
      warps [N, h, w, 3] uint8 (black in holes), masks [N, h, w] bool, depths [N, h, w] float32
      (nearest surface in the pixel, 0 in holes).
    """
    count, width, height = len(targets.intrinsics), targets.width, targets.height
    fine = int(np.clip(round(cameras[0].width / width), 1, SUPERSAMPLE))
    large = targets.resized(width * fine, height * fine)
    sources, colours = stack(cameras), np.stack(images) / np.float32(255)
    warps = np.empty((count, height, width, 3), np.uint8)
    masks, z = np.empty((count, height, width), bool), np.empty((count, height, width), np.float32)
    for i in tqdm(range(count), desc="warping", unit="view", leave=False):
        warped = warp_views(colours, np.stack(depths), sources, large[i : i + 1])
        tiles = (height, fine, width, fine)
        known = np.asarray(warped.known)[0].reshape(*tiles, 1)
        share = known.mean((1, 3))
        colour = (np.asarray(warped.image)[0].reshape(*tiles, 3) * known).mean((1, 3))
        depth = np.where(known[..., 0] > 0, np.asarray(warped.depth)[0].reshape(tiles), np.inf)
        masks[i] = share[..., 0] > _KNOWN_SHARE
        colour = np.where(masks[i][..., None], colour / np.maximum(share, 1e-6), 0)
        warps[i] = np.round(np.clip(colour, 0, 1) * 255).astype(np.uint8)
        z[i] = np.where(masks[i], depth.min((1, 3)), 0)
    return warps, masks, z
