"""From the frames of one clip to the views of one training example (NumPy, inside the input job).

Pose-free training needs no camera at all: it needs some frames of one static scene, in any order
(the paper shuffles them; views are an unordered set). Frames are cut around their centre to the
shape of the views and scaled to their size; `Crop` says which pixels those are, so that cameras and
depth can follow. Images come out float32 in [−1, 1].
"""

from __future__ import annotations

import dataclasses

import cv2
import numpy as np

Size = tuple[int, int]  # height, width in pixels

_TO_MODEL_RANGE = np.arange(256, dtype=np.float32) / np.float32(127.5) - np.float32(1.0)
_END_OF_JPEG = b"\xff\xd9"
# OpenCV's flag for "RGB, decoded at 1/r of the size" is not among its names for every r.
_DECODE = {
    1: cv2.IMREAD_COLOR_RGB,
    2: cv2.IMREAD_COLOR_RGB | cv2.IMREAD_REDUCED_GRAYSCALE_2,
    4: cv2.IMREAD_COLOR_RGB | cv2.IMREAD_REDUCED_GRAYSCALE_4,
    8: cv2.IMREAD_COLOR_RGB | cv2.IMREAD_REDUCED_GRAYSCALE_8,
}


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


@dataclasses.dataclass(frozen=True)
class Crop:
    """The part of a frame that a view shows, in pixels of the frame.

    Attributes:
      top, left, height, width: multiples of `reduction`.
      reduction: 1, 2, 4 or 8; JPEGs can be decoded at 1/reduction of their size for less work.
      frame: height and width of the whole frame.
      size: height and width of the view it is scaled to.
    """

    top: int
    left: int
    height: int
    width: int
    reduction: int
    frame: Size
    size: Size

    def image(self, jpeg: bytes) -> np.ndarray:
        """JPEG bytes of the frame → view, uint8 [*size, 3].

        Raises ValueError when they are no whole image of the frame's size.
        """
        # OpenCV fills what is missing of a file that was cut off with grey, and says nothing.
        if _END_OF_JPEG not in jpeg[-64:]:
            raise ValueError("a frame is no whole JPEG file")
        image = cv2.imdecode(np.frombuffer(jpeg, np.uint8), self.decode_flags)
        expected = tuple(-(-side // self.reduction) for side in self.frame)
        if image is None or image.shape[:2] != expected:
            found = "nothing" if image is None else f"{image.shape[:2]} pixels"
            raise ValueError(f"a frame of {self.frame} pixels was expected and {found} decoded")
        return self.scaled(image)

    @property
    def decode_flags(self) -> int:
        """How `cv2.imdecode` is to read the frame: RGB as stored, at 1/reduction of its size."""
        return _DECODE[self.reduction] | cv2.IMREAD_IGNORE_ORIENTATION

    def scaled(self, decoded: np.ndarray) -> np.ndarray:
        """The frame as decoded with `decode_flags` → view, uint8 [*size, 3]."""
        return self._scaled(decoded, self.reduction, smooth=True)

    def depth(self, depth: np.ndarray) -> np.ndarray:
        """Planar depth of the frame [H, W] → depth of the view [*size], nearest pixels."""
        if depth.shape != self.frame:
            raise ValueError(f"depth: expected {self.frame} pixels, got {depth.shape}")
        return self._scaled(depth, 1, smooth=False)

    def intrinsics(self, matrix: np.ndarray) -> np.ndarray:
        """[..., 3, 3] of the frame → of the view, pixel centres at +0.5."""
        scale = np.array([self.size[1] / self.width, self.size[0] / self.height, 1.0])
        moved = np.array(matrix, np.float64)
        moved[..., :2, 2] -= (self.left, self.top)
        return (moved * scale[:, None]).astype(np.float32)

    def _scaled(self, pixels: np.ndarray, reduction: int, smooth: bool) -> np.ndarray:
        top, left = self.top // reduction, self.left // reduction
        height, width = self.height // reduction, self.width // reduction
        pixels = pixels[top : top + height, left : left + width]
        if (height, width) == self.size:
            return pixels
        if smooth:
            return scale_image(pixels, self.size)
        return cv2.resize(pixels, self.size[::-1], interpolation=cv2.INTER_NEAREST_EXACT)


def centre_crop(frame: Size, size: Size) -> Crop:
    """The largest centred part of a frame that has the shape of a view of `size`."""
    height, width = frame
    ratio = size[1] / size[0]
    kept = (height, max(1, round(height * ratio)))
    if kept[1] > width:
        kept = (max(1, min(height, round(width / ratio))), width)
    reduction = next((r for r in (8, 4, 2) if kept[0] >= r * size[0] and kept[1] >= r * size[1]), 1)
    kept = tuple(side // reduction * reduction for side in kept)
    top, left = ((whole - part) // 2 // reduction * reduction for whole, part in zip(frame, kept))
    return Crop(top, left, *kept, reduction, frame, size)


def scale_image(image: np.ndarray, size: Size) -> np.ndarray:
    """uint8 [H, W, 3] → uint8 [*size, 3], smoothed before it shrinks, so that nothing aliases.

    Between 1 and 2, where every reduced JPEG ends up, pixels are mixed with their neighbours and
    then interpolated. That is as smooth as the mean over the area of an output pixel (the same
    variance of the kernel, so the same to second order in frequency) in a third of its time.
    """
    factors = [old / new for old, new in zip(image.shape, size)]
    if min(factors) < 1:
        return cv2.resize(image, size[::-1], interpolation=cv2.INTER_CUBIC)
    if max(factors) > 2:
        return cv2.resize(image, size[::-1], interpolation=cv2.INTER_AREA)
    rows, columns = map(_neighbours, factors)
    smooth = cv2.sepFilter2D(image, -1, columns, rows)
    return cv2.resize(smooth, size[::-1], interpolation=cv2.INTER_LINEAR)


def _neighbours(factor: float) -> np.ndarray:
    """Weights of a pixel and its two neighbours, [3] float32, before shrinking by 1 … 2.

    The mean over an area of `factor` pixels has the variance (factor² + 1)/12 (a pixel is an area
    too), interpolation 1/6; the difference, (factor² − 1)/12, is twice the weight of a neighbour.
    OpenCV filters bytes in steps of 1/256: rounded to them, the weights add up to 1 exactly.
    """
    side = round(256 * (factor**2 - 1) / 24) / 256
    return np.array([side, 1 - 2 * side, side], np.float32)


def to_model_range(image: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """uint8 [0, 255] → float32 [−1, 1], into `out` if given."""
    return cv2.LUT(image, _TO_MODEL_RANGE, dst=out)
