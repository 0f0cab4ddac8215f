"""Points that two pictures share: SIFT by default, or a learned matcher in an ONNX file.

A matcher takes two pictures, uint8 [H, W, 3], and gives `Matches` in their pixels. `verified` keeps
those that fit one motion of the camera (fundamental matrix, USAC with MAGSAC scoring).
An ONNX matcher finds and matches points in one go (an end-to-end export of SuperPoint + LightGlue,
DISK + LightGlue, LoFTR and the like). Its tensors:
    inputs   two float [1, 1 or 3, h, w], or one [2, 1 or 3, h, w]; values 0 to 1; free size
    outputs  points: keypoints0 / kpts0 and keypoints1 / kpts1 [.., N, 2], or keypoints [2, N, 2]
             pairs:  matches or matches0, [K, 2] of indices, [K, 3] with the pair's number before
                     them, or [.., N] the index in the second picture, −1 = none; absent: the
                     n-th point of the first picture is the n-th of the second
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np

from see3d_jax.errors import InputError
from see3d_jax.onnx_models import open_session

_RATIO = 0.8  # Lowe: the best match must be this much nearer than the second best
_CONTRAST = 0.015  # OpenCV's 0.04 leaves small pictures with few points
_MOST_POINTS = 4096
_FEWEST = 8  # points that a fundamental matrix needs


@dataclasses.dataclass(frozen=True)
class Matches:
    """K points of two pictures: first, second [K, 2] float32 pixels, centres at +0.5."""

    first: np.ndarray
    second: np.ndarray

    def __len__(self) -> int:
        return len(self.first)

    def __getitem__(self, chosen: np.ndarray) -> Matches:
        """The matches of a mask or of indices."""
        return Matches(self.first[chosen], self.second[chosen])


Matcher = Callable[[np.ndarray, np.ndarray], Matches]


@dataclasses.dataclass(frozen=True)
class Features:
    """N points of a picture: pixels [N, 2] float32, centres at +0.5; descriptors [N, 128]."""

    pixels: np.ndarray
    descriptors: np.ndarray

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, chosen: np.ndarray) -> Features:
        """The points of a mask or of indices."""
        return Features(self.pixels[chosen], self.descriptors[chosen])


def sift_features(picture: np.ndarray) -> Features:
    """SIFT points with the square roots of their descriptors (RootSIFT)."""
    # Without precise upscaling, OpenCV finds small points a quarter of a pixel off.
    sift = cv2.SIFT_create(
        nfeatures=_MOST_POINTS, contrastThreshold=_CONTRAST, enable_precise_upscale=True
    )
    points, found = sift.detectAndCompute(cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY), None)
    if not points:
        return Features(np.zeros((0, 2), np.float32), np.zeros((0, 128), np.float32))
    # OpenCV counts the first pixel's centre as 0
    pixels = np.array([point.pt for point in points], np.float32) + np.float32(0.5)
    return Features(pixels, np.sqrt(found / np.maximum(found.sum(1, keepdims=True), 1e-9)))


def match_features(first: Features, second: Features) -> Matches:
    """Ratio test, and both pictures must choose each other."""
    if min(len(first), len(second)) < 2:
        return _matches([], [])
    # Descriptors have length 1, so one product gives all distances.
    likeness = first.descriptors @ second.descriptors.T
    there, back = _distinct(likeness), _distinct(np.ascontiguousarray(likeness.T))
    chosen = np.nonzero((there >= 0) & (back[there] == np.arange(len(first))))[0]
    return Matches(first.pixels[chosen], second.pixels[there[chosen]])


def _distinct(likeness: np.ndarray) -> np.ndarray:
    """[N] which of M descriptors is much nearer than all others, −1 = none; cosines [N, M]."""
    rows, best = np.arange(len(likeness)), likeness.argmax(1)
    nearest = likeness[rows, best]
    others = likeness.copy()
    others[rows, best] = -1.0
    # squared distances are 2 − 2 · cosine
    return np.where(1 - nearest < _RATIO**2 * (1 - others.max(1)), best, -1)


def sift_matches(first: np.ndarray, second: np.ndarray) -> Matches:
    """What SIFT finds in both pictures; the default `Matcher`."""
    return match_features(sift_features(first), sift_features(second))


def verified(matches: Matches, threshold: float = 1.5) -> Matches:
    """Those that fit one fundamental matrix within `threshold` pixels; none if nothing fits."""
    if len(matches) < _FEWEST:
        return matches[:0]
    settings = cv2.UsacParams()
    settings.threshold, settings.confidence, settings.maxIterations = threshold, 0.9999, 10_000
    settings.score, settings.sampler = cv2.SCORE_METHOD_MAGSAC, cv2.SAMPLING_UNIFORM
    settings.loMethod, settings.randomGeneratorState = cv2.LOCAL_OPTIM_SIGMA, 0
    _, inlier = cv2.findFundamentalMat(matches.first, matches.second, settings)
    if inlier is None or inlier.sum() < _FEWEST:
        return matches[:0]
    return matches[inlier.ravel().astype(bool)]


def load_matcher(path: str | os.PathLike[str]) -> Matcher:
    """A `Matcher` out of an ONNX file with the tensors described above.

    Raises InputError: no such file, no onnxruntime, other tensors. So does the matcher itself.
    """
    path = Path(path)
    session = open_session(path, "--matcher", "depth")
    inputs = session.get_inputs()
    if len(inputs) not in (1, 2) or any(len(entry.shape) != 4 for entry in inputs):
        raise InputError(
            f"{path}: expected two pictures [1, 1 or 3, h, w], or one [2, …], as input"
        )

    def match(first: np.ndarray, second: np.ndarray) -> Matches:
        grey = inputs[0].shape[1] == 1
        a, b = (_tensor(picture, grey) for picture in (first, second))
        if len(inputs) == 2:
            feeds = {inputs[0].name: a, inputs[1].name: b}
        else:  # one batch: both of the larger size, the smaller filled up with black
            height, width = (max(a.shape[i], b.shape[i]) for i in (2, 3))
            pad = [np.pad(p, [(0, 0), (0, 0), (0, height - p.shape[2]), (0, width - p.shape[3])])
                   for p in (a, b)]  # fmt: skip
            feeds = {inputs[0].name: np.concatenate(pad)}
        try:
            values = session.run(None, feeds)
        except Exception as error:
            raise InputError(f"{path}: cannot match these pictures: {error}") from None
        names = [output.name for output in session.get_outputs()]
        return _pairs(dict(zip(names, values, strict=True)), path)

    return match


def _tensor(picture: np.ndarray, grey: bool) -> np.ndarray:
    values = picture.astype(np.float32) / 255
    values = values @ np.float32([0.299, 0.587, 0.114]) if grey else values.transpose(2, 0, 1)
    return np.ascontiguousarray(values.reshape(1, 1 if grey else 3, *picture.shape[:2]))


def _pairs(outputs: dict[str, np.ndarray], path: Path) -> Matches:
    """The network's tensors as matches; networks count the first pixel's centre as 0."""
    if "keypoints" in outputs:
        first, second = outputs["keypoints"]
    else:
        first, second = (
            next((outputs[n + i] for n in ("keypoints", "kpts", "mkpts") if n + i in outputs), None)
            for i in "01"
        )
    if first is None or second is None:
        raise InputError(f"{path}: no keypoints among its outputs {', '.join(outputs)}")
    first, second = (np.asarray(p, np.float32).reshape(-1, 2) + 0.5 for p in (first, second))
    pairs = next((outputs[name] for name in ("matches", "matches0") if name in outputs), None)
    if pairs is None:
        index = np.stack([np.arange(min(len(first), len(second)))] * 2, -1)
    elif pairs.ndim == 2 and pairs.shape[-1] in (2, 3) and pairs.shape != (1, len(first)):
        index = np.asarray(pairs)[:, -2:]
    else:  # one entry for each point of the first picture
        flat = np.asarray(pairs).reshape(-1)
        index = np.stack([np.nonzero(flat >= 0)[0], flat[flat >= 0]], -1)
    index = index.astype(int)
    if len(index) and (index.min() < 0 or (index.max(0) >= [len(first), len(second)]).any()):
        raise InputError(f"{path}: its matches name points that it did not find")
    return _matches(first[index[:, 0]], second[index[:, 1]])


def _matches(first: list | np.ndarray, second: list | np.ndarray) -> Matches:
    return Matches(*(np.asarray(points, np.float32).reshape(-1, 2) for points in (first, second)))
