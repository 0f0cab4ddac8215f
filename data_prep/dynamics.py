"""Stage 3, non-rigid dynamic filtering: which pixels move against the rigid scene?

Dense flow of frame pairs is explained by a fundamental matrix; or, when the camera only turned or
zoomed, by a homography: a fundamental matrix is then undetermined and would explain a mover too.
Pixels whose error stays above the tolerance are dynamic. As in the paper every frame scores
2 / 1.5 / 1 / 0.5 / 0 from the dynamic share of the whole frame and of its centre (the middle half
of both axes), and a clip whose scores sum to S ≥ 0.25 N is dropped.

Errors are pixels at 480p. Masks are bool [H, W], True = dynamic.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from data_prep.epipolar import (
    fit_fundamental,
    fit_homography,
    homography_error,
    sampson_error,
)
from data_prep.flow import FlowBackend, FlowPair, dis_flow, flow_pair
from data_prep.tracking import Tracks

PAIR_MOTION = 10.0  # px at 480p: enough for the epipolar constraint to bite, little occlusion
FASTEST_MOTION = 40.0  # px at 480p: flow loses what moves farther, so movers would go unseen
MAX_PAIR_SECONDS = 1.0
TOLERANCE = 1.5  # px at 480p; DIS is good to about half of it on textured surfaces
RELATIVE_TOLERANCE = 0.03  # of the motion, since flow errors grow with motion
FIT_SAMPLES = 1500
MIN_CONSISTENT = 0.1  # below this share of usable pixels a pair says nothing


@dataclasses.dataclass(frozen=True)
class DynamicMask:
    """Dynamic pixels of one frame against a second one.

    Attributes:
      first, second: frame indices.
      mask: [H, W] bool.
      whole, centre: dynamic share of the frame and of its middle half.
      consistent: share of visible pixels with forward/backward consistent flow.
      score: the paper's 2 / 1.5 / 1 / 0.5 / 0.
    """

    first: int
    second: int
    mask: np.ndarray
    whole: float
    centre: float
    consistent: float
    score: float


def choose_pairs(tracks: Tracks, times: np.ndarray, wanted: int) -> list[tuple[int, int]]:
    """Up to `wanted` frame pairs spread over the clip, each far enough apart to show motion."""
    count = len(times)
    pairs = []
    for first in np.unique(np.linspace(0, count - 1, min(wanted, count)).astype(int)):
        ahead = _partner(tracks, times, first, range(first + 1, count))
        back = _partner(tracks, times, first, range(first - 1, -1, -1))
        options = [option for option in (ahead, back) if option is not None]
        # the first that shows enough motion, else the one with most of it
        enough = [option for option in options if option[1] >= PAIR_MOTION]
        partner = enough[0] if enough else max(options, key=lambda option: option[1])
        pairs.append((int(first), partner[0]))
    return pairs


def _partner(
    tracks: Tracks, times: np.ndarray, first: int, candidates: range
) -> tuple[int, float] | None:
    """(frame, median motion) of the nearest candidate with enough motion, or the last usable."""
    partner = None
    for candidate in candidates:
        common = tracks.common(first, candidate)
        too_far = abs(times[candidate] - times[first]) > MAX_PAIR_SECONDS or len(common) < 20
        if too_far and partner is not None:
            break
        motion, fastest = _motion(tracks, common, first, candidate)
        if fastest > FASTEST_MOTION and partner is not None:
            break
        partner = (int(candidate), motion)
        if motion >= PAIR_MOTION or too_far:
            break
    return partner


def _motion(tracks: Tracks, common: np.ndarray, first: int, second: int) -> tuple[float, float]:
    """Median and 95 % quantile of the displacement, px at 480p."""
    if not len(common):
        return 0.0, 0.0
    motion = np.linalg.norm(tracks.xy[common, second] - tracks.xy[common, first], axis=1)
    return float(np.median(motion)) / tracks.scale, float(np.quantile(motion, 0.95)) / tracks.scale


def dynamic_mask(
    frames: np.ndarray,
    pair: tuple[int, int],
    camera_travels: bool,
    seed: int,
    backend: FlowBackend = dis_flow,
) -> DynamicMask:
    """Flow, epipolar fit and cleaned mask for one pair of [F, H, W, 3] uint8 RGB frames.

    `camera_travels` says which rigid motion is allowed: an epipolar geometry, or only the
    homography of a camera that stands and turns.
    """
    size = frames.shape[1:3]
    scale = min(size) / 480.0
    first, second = (np.ascontiguousarray(frames[index]) for index in pair)
    flow = flow_pair(first, second, scale, backend)
    consistent = float(flow.consistent.sum() / max(1, flow.visible.sum()))
    if consistent < MIN_CONSISTENT:
        mask = np.zeros(size, bool)
        return DynamicMask(*pair, mask, 0.0, 0.0, consistent, 0.0)
    mask = _clean(_against_rigid_motion(flow, camera_travels, scale, seed), scale)
    height, width = mask.shape
    centre = mask[height // 4 : height - height // 4, width // 4 : width - width // 4]
    whole_share, centre_share = float(mask.mean()), float(centre.mean())
    score = frame_score(whole_share, centre_share)
    return DynamicMask(*pair, mask, whole_share, centre_share, consistent, score)


def frame_score(whole: float, centre: float) -> float:
    """The paper's per-frame score from the dynamic share of the frame and of its centre."""
    if whole >= 0.12:
        return 2.0 if centre >= 0.35 else 1.5 if centre >= 0.2 else 1.0
    return 0.5 if whole >= 0.05 or centre >= 0.1 else 0.0


def _against_rigid_motion(
    flow: FlowPair, camera_travels: bool, scale: float, seed: int
) -> np.ndarray:
    """Pixels with trustworthy flow that no rigid camera motion explains: [H, W] bool."""
    height, width = flow.consistent.shape
    rows, columns = np.nonzero(flow.consistent)
    generator = np.random.default_rng(seed)
    picked = generator.choice(len(rows), min(FIT_SAMPLES, len(rows)), replace=False)
    a = np.stack([columns[picked], rows[picked]], -1).astype(np.float32)
    b = a + flow.forward[rows[picked], columns[picked]]
    threshold = max(0.5, TOLERANCE * scale)
    x, y = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
    start = np.stack([x, y], -1)
    end = start + flow.forward
    tolerance = threshold + RELATIVE_TOLERANCE * np.linalg.norm(flow.forward, axis=-1)
    homography, _ = fit_homography(a, b, threshold, seed)
    rigid = homography_error(homography, start, end) <= tolerance
    if camera_travels:
        fundamental, _ = fit_fundamental(a, b, threshold, seed)
        rigid |= sampson_error(fundamental, start, end) <= tolerance
    return flow.consistent & ~rigid


def _clean(mask: np.ndarray, scale: float) -> np.ndarray:
    """Opening removes specks and thin outlines of depth edges; closing joins a mover's parts."""
    import cv2

    def disk(radius: float) -> np.ndarray:
        size = 2 * max(1, round(radius * scale)) + 1
        return cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (size, size))

    opened = cv2.morphologyEx(mask.astype(np.uint8), cv2.MORPH_OPEN, disk(3))
    return cv2.morphologyEx(opened, cv2.MORPH_CLOSE, disk(5)) > 0
