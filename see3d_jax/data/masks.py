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
# Shapes are drawn on a canvas whose shorter side is at most this and scaled up with smooth edges:
# a sixth of the work at 512 pixels, and nothing they show is thinner than four pixels there.
_CANVAS = 128
_IS_KNOWN = (np.arange(256) > 127).astype(np.float32)
_ANGLES = np.linspace(0, 2 * np.pi, 48, endpoint=False)
_FREQUENCIES = np.arange(1, 5)
# cos(f a + phase) of every frequency f and angle a is Re(exp(i phase) exp(i f a)); [4, 48]
_WAVES = np.exp(1j * np.outer(_FREQUENCIES, _ANGLES))
_CIRCLE = np.exp(1j * _ANGLES)


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
    scale = min(1.0, _CANVAS / min(height, width))
    hole = np.zeros((round(height * scale), round(width * scale)), np.uint8)
    # Each kind digs up to its own share; the last one fills up what is still wanted.
    for order, index in enumerate(chosen):
        last = order == len(chosen) - 1
        share = wanted if last else wanted * rng.uniform(0.2, 0.8)
        hole = _dig(rng, hole, share, kinds[index])
    known = 255 * (1 - hole)
    if scale < 1:
        known = cv2.resize(known, (width, height), interpolation=cv2.INTER_LINEAR)
    return cv2.LUT(known, _IS_KNOWN)[..., None]


def _dig(rng: np.random.Generator, hole: np.ndarray, share: float, kind: str) -> np.ndarray:
    """Adds shapes of one kind until at least `share` − 0.02 of all pixels are missing.

    `hole` and the result are uint8 [h, w], 1 = missing.
    """
    draw = {"brush": _brush, "blob": _blob, "shadow": _shadow}.get(kind)
    # Large holes are made of large shapes; they shrink each time one would overshoot.
    size = 1.0 + 2.0 * share
    missing = _missing(hole)
    for _ in range(200):
        if missing >= share - 0.02:
            break
        grown = hole | draw(rng, *hole.shape, size) if draw else _side(rng, hole, share)
        missing_then = _missing(grown)
        if missing_then > share + 0.05:
            size = max(0.15, size * 0.7)
            continue
        hole, missing = grown, missing_then
    return hole


def _missing(hole: np.ndarray) -> float:
    return cv2.countNonZero(hole) / hole.size


def _brush(rng: np.random.Generator, height: int, width: int, size: float) -> np.ndarray:
    """A stroke that walks with slowly turning direction and changing thickness."""
    canvas = np.zeros((height, width), np.uint8)
    scale = min(height, width) * size
    steps = int(rng.integers(3, 10))
    angles = rng.uniform(0, 2 * np.pi) + rng.normal(0, 0.7, steps).cumsum()
    lengths = rng.uniform(0.08, 0.3, steps) * scale
    start = rng.random() * width + 1j * rng.random() * height  # x + i y
    path = _points(start + (lengths * np.exp(1j * angles)).cumsum()).tolist()
    thickness = rng.uniform(0.02, 0.12) * scale * rng.uniform(0.6, 1.4, steps)
    thickness = np.maximum(1, np.rint(thickness)).astype(int).tolist()
    for here, there, width_now in zip(path, path[1:], thickness):
        cv2.line(canvas, here, there, 1, width_now)  # its ends are round
    return canvas


def _blob(rng: np.random.Generator, height: int, width: int, size: float) -> np.ndarray:
    """A closed curve whose radius is a random low-frequency Fourier series of the angle."""
    amplitude = rng.normal(0, 0.28, 4) / _FREQUENCIES
    series = (amplitude * np.exp(1j * rng.uniform(0, 2 * np.pi, 4))) @ _WAVES
    radius = np.maximum(1 + series.real, 0.2) * rng.uniform(0.06, 0.3) * min(height, width) * size
    stretch = np.exp(rng.normal(0, 0.35))
    centre = rng.random() * width + 1j * rng.random() * height  # x + i y
    outline = centre + radius * (_CIRCLE.real * stretch + 1j * (_CIRCLE.imag / stretch))
    canvas = np.zeros((height, width), np.uint8)
    cv2.fillPoly(canvas, [_points(outline)], 1)
    return canvas


def _points(places: np.ndarray) -> np.ndarray:
    """Complex x + i y [n] → the nearest pixels (x, y), [n, 2] int32."""
    return np.rint(places.view(np.float64)).astype(np.int32).reshape(-1, 2)


def _shadow(rng: np.random.Generator, height: int, width: int, size: float) -> np.ndarray:
    """The strip that a foreground shape uncovers when it moves: shape shifted, minus shape."""
    shape = _blob(rng, height, width, size * 1.5)
    reach = rng.uniform(0.05, 0.3) * min(height, width) * size
    angle = rng.normal(0, 0.4) + np.pi * rng.integers(2)  # cameras mostly move sideways
    shift = np.float32([[1, 0, reach * np.cos(angle)], [0, 1, reach * np.sin(angle)]])
    moved = cv2.warpAffine(shape, shift, (width, height), flags=cv2.INTER_NEAREST)
    return moved & (1 - shape)


def _side(rng: np.random.Generator, hole: np.ndarray, share: float) -> np.ndarray:
    """A half-plane with a wavy edge, cut exactly where `share` of all pixels are missing."""
    height, width = hole.shape
    scale = np.float32(1 / min(height, width))
    y = (np.arange(height, dtype=np.float32)[:, None] + np.float32(0.5)) * scale
    x = (np.arange(width, dtype=np.float32) + np.float32(0.5)) * scale
    cosine, sine = _direction(rng)
    along, across = cosine * y - sine * x, cosine * x + sine * y
    for _ in range(3):
        frequency, phase, amplitude = rng.uniform((2, 0, 0), (14, 2 * np.pi, 0.06))
        across += np.float32(amplitude) * np.sin(np.float32(frequency) * along + np.float32(phase))
    across[hole > 0] = -np.inf  # pixels that are missing already count first
    count = min(round(share * across.size), across.size - 1)
    return (across < np.partition(across, count, axis=None)[count]).astype(np.uint8)


def _direction(rng: np.random.Generator) -> tuple[np.float32, np.float32]:
    """Cosine and sine of a random angle."""
    angle = rng.uniform(0, 2 * np.pi)
    return np.float32(np.cos(angle)), np.float32(np.sin(angle))
