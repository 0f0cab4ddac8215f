"""Random irregular masks: what the model is told is missing while it trains (paper Sec. 3.2).

The paper says "random irregular masks" and no more, so shape and size are our own design. At
generation time the holes come from warping: whole sides of the view that no input saw, slivers
beside depth edges, and patches where the warp is unreliable. Four kinds of hole imitate that:

    brush     free-form strokes              thin cracks, resampling gaps
    blob      smooth random shapes           unreliable patches
    shadow    a blob moved, minus the blob   disocclusion beside a foreground object
    side      a wavy half-plane              what lies outside every input's view

One or two kinds are mixed per mask, and the share of missing pixels is drawn evenly from a wide
range, because trajectories start with few holes and end with mostly holes.

Masks are float32 [h, w, 1], 1 = known pixel, 0 = hole, as everywhere in this project.
"""

from __future__ import annotations

import cv2
import numpy as np

KINDS = ("brush", "blob", "shadow", "side")


def random_mask(
    rng: np.random.Generator,
    height: int,
    width: int,
    hole_range: tuple[float, float] = (0.1, 0.9),
    kinds: tuple[str, ...] = KINDS,
) -> np.ndarray:
    """Draws one mask [height, width, 1] float32, 1 = known.

    The share of holes is uniform in `hole_range`; the last shape drawn may miss the wanted share by
    a few percent, never by more than 0.1 on pictures of at least 32 pixels.
    """
    wanted = rng.uniform(*hole_range)
    chosen = rng.choice(len(kinds), size=min(len(kinds), int(rng.integers(1, 3))), replace=False)
    hole = np.zeros((height, width), bool)
    # Each kind digs up to its own share; the last one fills up what is still wanted.
    for order, index in enumerate(chosen):
        last = order == len(chosen) - 1
        share = wanted if last else wanted * rng.uniform(0.2, 0.8)
        hole = _dig(rng, hole, share, kinds[index])
    return (~hole).astype(np.float32)[..., None]


def _dig(rng: np.random.Generator, hole: np.ndarray, share: float, kind: str) -> np.ndarray:
    """Adds shapes of one kind until at least `share` − 0.02 of all pixels are missing."""
    size = 1.0  # shapes shrink each time one would overshoot, so the loop ends close to `share`
    for _ in range(200):
        missing = hole.mean()
        if missing >= share - 0.02:
            break
        if kind == "side":
            grown = _side(rng, hole, share)
        else:
            shape = {"brush": _brush, "blob": _blob, "shadow": _shadow}[kind]
            grown = hole | shape(rng, *hole.shape, size)
        if grown.mean() > share + 0.05:
            size = max(0.15, size * 0.7)
            continue
        hole = grown
    return hole


def _brush(rng: np.random.Generator, height: int, width: int, size: float) -> np.ndarray:
    """A stroke that walks with slowly turning direction and changing thickness."""
    canvas = np.zeros((height, width), np.uint8)
    scale = min(height, width)
    x, y = rng.uniform(0, width), rng.uniform(0, height)
    angle = rng.uniform(0, 2 * np.pi)
    thickness = rng.uniform(0.02, 0.12) * scale * size
    for _ in range(int(rng.integers(3, 10))):
        angle += rng.normal(0, 0.7)
        length = rng.uniform(0.08, 0.3) * scale * size
        x_next, y_next = x + length * np.cos(angle), y + length * np.sin(angle)
        width_now = max(1, round(thickness * rng.uniform(0.6, 1.4)))
        cv2.line(canvas, (round(x), round(y)), (round(x_next), round(y_next)), 1, width_now)
        cv2.circle(canvas, (round(x_next), round(y_next)), width_now // 2, 1, -1)
        x, y = x_next, y_next
    return canvas.astype(bool)


def _blob(rng: np.random.Generator, height: int, width: int, size: float) -> np.ndarray:
    """A closed curve whose radius is a random low-frequency Fourier series of the angle."""
    theta = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    radius = np.ones_like(theta)
    for frequency in range(1, 5):
        amplitude = rng.normal(0, 0.28 / frequency)
        radius += amplitude * np.cos(frequency * theta + rng.uniform(0, 2 * np.pi))
    radius = np.clip(radius, 0.2, None) * rng.uniform(0.06, 0.3) * min(height, width) * size
    stretch = np.exp(rng.normal(0, 0.35))
    centre = rng.uniform(0, 1, 2) * (width, height)
    points = centre + np.stack(
        [radius * np.cos(theta) * stretch, radius * np.sin(theta) / stretch], -1
    )
    canvas = np.zeros((height, width), np.uint8)
    cv2.fillPoly(canvas, [np.round(points).astype(np.int32)], 1)
    return canvas.astype(bool)


def _shadow(rng: np.random.Generator, height: int, width: int, size: float) -> np.ndarray:
    """The strip that a foreground shape uncovers when it moves: shape shifted, minus shape."""
    shape = _blob(rng, height, width, size * 1.5)
    reach = rng.uniform(0.05, 0.3) * min(height, width) * size
    angle = rng.normal(0, 0.4) + rng.choice([0, np.pi])  # cameras mostly move sideways
    shift = np.float32([[1, 0, reach * np.cos(angle)], [0, 1, reach * np.sin(angle)]])
    moved = cv2.warpAffine(shape.astype(np.uint8), shift, (width, height), flags=cv2.INTER_NEAREST)
    return moved.astype(bool) & ~shape


def _side(rng: np.random.Generator, hole: np.ndarray, share: float) -> np.ndarray:
    """A half-plane with a wavy edge, cut exactly where `share` of all pixels are missing."""
    height, width = hole.shape
    y, x = np.mgrid[0.5:height, 0.5:width] / min(height, width)
    angle = rng.uniform(0, 2 * np.pi)
    along, across = (
        np.cos(angle) * y - np.sin(angle) * x,
        np.cos(angle) * x + np.sin(angle) * y,
    )
    for _ in range(3):
        wave = rng.uniform(2, 14) * along + rng.uniform(0, 2 * np.pi)
        across = across + rng.uniform(0, 0.06) * np.sin(wave)
    across = np.where(hole, -np.inf, across)  # pixels that are missing already count first
    count = min(round(share * across.size), across.size - 1)
    return across < np.partition(across, count, axis=None)[count]
