"""Warps of the references to target cameras, antialiased, with a mask of what is known.

Images are uint8 RGB [h, w, 3], masks bool with True = known, depth planar z with 0 = unknown.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from tqdm import tqdm

from see3d_jax.geometry.cameras import Camera, stack
from see3d_jax.geometry.warping import warp_views

SUPERSAMPLE = 4  # references are warped at up to this many times the working size
_MOST_STRETCH = 2.0  # of a source pixel, in pixels of the warp: beyond that it blurs and cracks
_SAME_SURFACE = 0.03  # relative step of inverse depth between neighbours
_KNOWN_SHARE = 0.9  # of a pixel; the released code thresholds its warp masks there, too


@dataclasses.dataclass(frozen=True)
class View:
    """A picture that can be warped.

    Attributes:
      image: [h, w, 3] uint8.
      depth: [h, w] float32 planar depth, 0 = unknown.
      camera: one camera of this size.
      first_hand: [h, w] bool, False where the colour was itself warped here; None = all first hand.
        Only pixels that are first hand are warped, so that a surface is resampled once and does not
        blur from view to view.
    """

    image: np.ndarray
    depth: np.ndarray
    camera: Camera
    first_hand: np.ndarray | None = None

    @property
    def own_depth(self) -> np.ndarray:
        """[h, w], the depth of what is first hand, 0 elsewhere."""
        return self.depth if self.first_hand is None else np.where(self.first_hand, self.depth, 0)


def warp_references(
    references: list[View], targets: Camera
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Warps the references to every target, merged by z-buffer.

    References may be larger than the targets: then each target is warped at up to 4 times its size
    and averaged, so that textures do not alias. A pixel is known when more than 0.9 of it is, and
    a source shows it large enough.

    Args:
      references: R views, all of one size.
      targets: batch [N].

    Returns:
      warps [N, h, w, 3] uint8 (black in holes), masks [N, h, w] bool, depths [N, h, w] float32
      (nearest surface in the pixel, 0 in holes).
    """
    count, width, height = len(targets.intrinsics), targets.width, targets.height
    fine = int(np.clip(round(references[0].camera.width / width), 1, SUPERSAMPLE))
    large = targets.resized(width * fine, height * fine)
    sources = stack([view.camera for view in references])
    colours = np.stack([view.image for view in references]) / np.float32(255)
    surfaces = np.stack([view.own_depth for view in references])
    warps = np.empty((count, height, width, 3), np.uint8)
    masks, z = np.empty((count, height, width), bool), np.empty((count, height, width), np.float32)
    for i in tqdm(range(count), desc="warping", unit="view", leave=False):
        warped = warp_views(
            colours, surfaces, sources, large[i : i + 1], most_stretch=_MOST_STRETCH
        )
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


def resize_depth(depth: np.ndarray, width: int, height: int) -> np.ndarray:
    """Depth [h, w] at the pixel centres of another size; planes stay planes, edges stay edges.

    The four pixels around each centre are interpolated in inverse depth, as far as they lie on the
    surface of the nearest of them. 0 = unknown stays so.
    """
    inverse = np.where(np.isfinite(depth) & (depth > 0), 1 / np.maximum(depth, 1e-12), 0)
    steps = []
    for axis, length in enumerate((height, width)):
        size = depth.shape[axis]
        position = np.clip((np.arange(length) + 0.5) * size / length - 0.5, 0, size - 1)
        first = np.minimum(position.astype(int), max(0, size - 2))
        steps.append((first, np.minimum(first + 1, size - 1), position - first))
    rows, columns = steps
    nearest = np.ix_(*(np.where(part >= 0.5, second, first) for first, second, part in steps))
    base = inverse[nearest]
    total, weights = np.zeros_like(base), np.zeros_like(base)
    for j in (0, 1):
        for i in (0, 1):
            tap = inverse[np.ix_(rows[j], columns[i])]
            down, across = (part if k else 1 - part for k, part in ((j, rows[2]), (i, columns[2])))
            same = np.abs(tap - base) <= _SAME_SURFACE * base
            weight = np.where(same, down[:, None] * across[None], 0)
            total, weights = total + weight * tap, weights + weight
    known = base > 0
    return np.where(known, weights / np.where(known, total, 1), 0).astype(np.float32)
