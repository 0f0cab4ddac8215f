"""From the frames of one clip to the views of one training example (NumPy, inside the input job).

Pose-free training needs no camera at all: it needs some frames of one static scene, in any order
(the paper shuffles them; views are an unordered set). Images come out float32 in [−1, 1].
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image


def choose_frames(
    rng: np.random.Generator,
    num_frames: int,
    num_views: int,
    stride_range: tuple[int, int],
) -> np.ndarray:
    """Draws `num_views` distinct frame numbers, evenly spaced in time, in shuffled order.

    The stride is uniform in `stride_range` as far as the clip is long enough for it, else as wide
    as the clip allows. Raises ValueError when the clip has fewer frames than views.
    """
    if num_frames < num_views:
        raise ValueError(f"the clip has {num_frames} frames, {num_views} views are wanted")
    widest = (num_frames - 1) // max(1, num_views - 1)
    low, high = min(stride_range[0], widest), min(stride_range[1], widest)
    stride = int(rng.integers(low, high + 1))
    start = int(rng.integers(0, num_frames - stride * (num_views - 1)))
    return rng.permutation(start + stride * np.arange(num_views))


def decode_square(jpeg: bytes, size: int) -> np.ndarray:
    """Image bytes → centre square, resized to uint8 [size, size, 3].

    JPEG can be decoded at 1/2, 1/4 or 1/8 of its size for a fraction of the cost; the decoder picks
    the smallest that is still at least twice as large as wanted, and the antialiased resize does
    the rest.
    """
    with Image.open(io.BytesIO(jpeg)) as opened:
        opened.draft("RGB", (2 * size, 2 * size))
        image = opened.convert("RGB")
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    image = image.resize(
        (size, size), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side)
    )
    return np.asarray(image)


def to_model_range(image: np.ndarray) -> np.ndarray:
    """uint8 [0, 255] → float32 [−1, 1]."""
    return image.astype(np.float32) / np.float32(127.5) - np.float32(1.0)
