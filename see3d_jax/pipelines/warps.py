"""Warps of the references to target cameras, antialiased, with a mask of what is known.

Images are uint8 RGB [h, w, 3], masks bool with True = known, depth planar z with 0 = unknown.
"""

from __future__ import annotations

import dataclasses
import math

import cv2
import numpy as np
from tqdm import tqdm

from see3d_jax.geometry.cameras import Camera, stack
from see3d_jax.geometry.warping import warp_views

SUPERSAMPLE = 4  # references are warped at up to this many times the working size
_MOST_STRETCH = 2.0  # of a source pixel, in pixels of the warp: beyond that it blurs and cracks
_SAME_SURFACE = 0.03  # relative step of inverse depth between neighbours
_SAME_SHAPE = 0.02  # log of the ratio of aspect ratios that are the same but for rounding
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
      references: R views, each of its own size.
      targets: batch [N].

    Returns:
      warps [N, h, w, 3] uint8 (black in holes), masks [N, h, w] bool, depths [N, h, w] float32
      (nearest surface in the pixel, 0 in holes).
    """
    count, width, height = len(targets.intrinsics), targets.width, targets.height
    colours, surfaces, sources = _on_canvas(references)
    fine = int(np.clip(round(sources.width / width), 1, SUPERSAMPLE))
    large = targets.resized(width * fine, height * fine)
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


def _on_canvas(views: list[View]) -> tuple[np.ndarray, np.ndarray, Camera]:
    """Colours [R, h, w, 3] in [0, 1], depths [R, h, w] and cameras, on a canvas that holds each.

    What a smaller view lacks on the right and at the bottom has no depth and is not warped.
    """
    width, height = (max(getattr(v.camera, side) for v in views) for side in ("width", "height"))
    colours = np.zeros((len(views), height, width, 3), np.float32)
    surfaces = np.zeros((len(views), height, width), np.float32)
    for i, view in enumerate(views):
        rows, columns = view.depth.shape
        colours[i, :rows, :columns] = view.image / np.float32(255)
        surfaces[i, :rows, :columns] = view.own_depth
    return colours, surfaces, stack([view.camera.window(0, 0, width, height) for view in views])


def middle_of(view: View, shape: tuple[int, int], width: int, height: int) -> View:
    """The largest middle part of a view with the aspect ratio of `shape`, as width × height pixels.

    A view of that shape (width, height) is kept whole, whatever the rounding of the result.
    """
    wide, high = view.camera.width, view.camera.height
    wider = wide * shape[1] / (high * shape[0])
    if abs(math.log(wider)) > _SAME_SHAPE:
        wide, high = round(wide / max(1, wider)), round(high * min(1, wider))
    left, top = (view.camera.width - wide) // 2, (view.camera.height - high) // 2
    part = slice(top, top + high), slice(left, left + wide)
    return View(
        resize_image(view.image[part], width, height),
        resize_depth(view.depth[part], width, height),
        view.camera.window(left, top, wide, high).resized(width, height),
    )


def resize_image(image: np.ndarray, width: int, height: int) -> np.ndarray:
    """Antialiased (area) resize of [H, W] or [H, W, 3], uint8 or float32."""
    shrink = width <= image.shape[1]
    return cv2.resize(
        image, (width, height), interpolation=cv2.INTER_AREA if shrink else cv2.INTER_CUBIC
    )


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
