"""Stage 4, small-viewpoint filtering: does the camera move, and does the scene show parallax?

Keypoints are followed with pyramidal Lucas-Kanade, every step checked forward and backward. The
paper's measure is the radius of the smallest circle that covers 60 % of a track. A long track is
not enough: under pure rotation or zoom every point travels far, yet one homography explains all of
it and nothing can be learnt about depth. So tracks of frame pairs far apart are explained by a
homography and by a fundamental matrix, and only what the second explains and the first does not
counts as multi-view evidence.

Points are [.., 2] (x, y) float32 pixels. Lengths in scores are pixels at 480p (short side = 480),
so that thresholds mean the same at every resolution.
"""

from __future__ import annotations

import dataclasses

import numpy as np

TRACKS_WANTED = 400
CIRCLE_SHARE = 0.6
MIN_PAIR_TRACKS = 40
LOST = np.float32(np.nan)


@dataclasses.dataclass(frozen=True)
class Tracks:
    """T point tracks over F frames; NaN where a track is not (or no longer) seen.

    Attributes:
      xy: [T, F, 2] float32 pixels.
      size: (width, height) of the frames.
    """

    xy: np.ndarray
    size: tuple[int, int]

    @property
    def scale(self) -> float:
        """Pixels of this clip per pixel at 480p."""
        return min(self.size) / 480.0

    def common(self, first: int, second: int) -> np.ndarray:
        """Indices of tracks seen in both frames."""
        return np.flatnonzero(
            np.isfinite(self.xy[:, first, 0]) & np.isfinite(self.xy[:, second, 0])
        )


@dataclasses.dataclass(frozen=True)
class PairGeometry:
    """How two frames relate, from their common tracks.

    Attributes:
      first, second: frame indices.
      tracks: number of common tracks.
      motion: median displacement, px at 480p.
      homography_share: share of tracks explained by one homography.
      epipolar_share: share explained by one fundamental matrix.
      parallax_share: share explained by the fundamental matrix, not by the homography.
      turn_residual: how far the homography is from a turning and zooming camera, px at 480p; a
        large value means that the camera itself moved, even past a flat scene.
    """

    first: int
    second: int
    tracks: int
    motion: float
    homography_share: float
    epipolar_share: float
    parallax_share: float
    turn_residual: float


def follow_points(grays: np.ndarray) -> Tracks:
    """Tracks corners through [F, H, W] uint8 frames, adding new ones where old ones were lost."""
    import cv2

    count, height, width = grays.shape
    scale = min(height, width) / 480.0
    lk = dict(
        winSize=(15, 15),
        maxLevel=4,
        criteria=(cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, 20, 0.02),
        minEigThreshold=1e-3,
    )
    spacing = max(3.0, 14.0 * scale)
    xy = np.full((0, count, 2), LOST, np.float32)
    alive = np.zeros(0, int)
    for f in range(count):
        if f:
            points = xy[alive, f - 1]
            if len(points):
                forward, ok, _ = cv2.calcOpticalFlowPyrLK(
                    grays[f - 1], grays[f], points[:, None], None, **lk
                )
                back, ok_back, _ = cv2.calcOpticalFlowPyrLK(
                    grays[f], grays[f - 1], forward, None, **lk
                )
                moved = forward[:, 0]
                error = np.linalg.norm(back[:, 0] - points, axis=1)
                inside = (
                    (moved[:, 0] > 2) & (moved[:, 0] < width - 3)
                    & (moved[:, 1] > 2) & (moved[:, 1] < height - 3)
                )  # fmt: skip
                good = (ok[:, 0] > 0) & (ok_back[:, 0] > 0) & inside & (error < max(0.5, scale))
                alive = alive[good]
                xy[alive, f] = moved[good]
        if len(alive) < 0.6 * TRACKS_WANTED and f < count - 1:
            free = np.full((height, width), 255, np.uint8)
            for x, y in xy[alive, f]:
                cv2.circle(free, (int(x), int(y)), int(spacing), 0, -1)
            fresh = cv2.goodFeaturesToTrack(
                grays[f], TRACKS_WANTED - len(alive), 0.003, spacing, mask=free, blockSize=5
            )
            if fresh is not None:
                rows = np.full((len(fresh), count, 2), LOST, np.float32)
                rows[:, f] = fresh[:, 0]
                alive = np.concatenate([alive, len(xy) + np.arange(len(fresh))])
                xy = np.concatenate([xy, rows])
    return Tracks(xy, (width, height))


def wide_pairs(tracks: Tracks, anchors: int = 8, survival: float = 0.4) -> list[tuple[int, int]]:
    """For some anchor frames, the frame farthest away that still shares enough tracks."""
    seen = np.isfinite(tracks.xy[..., 0])  # [T, F]
    count = seen.shape[1]
    shared = seen.T.astype(np.float32) @ seen.astype(np.float32)  # [F, F]
    pairs = []
    for first in np.unique(np.linspace(0, count * 0.75, anchors).astype(int)):
        enough = max(MIN_PAIR_TRACKS, survival * shared[first, first])
        later = np.flatnonzero(shared[first, first + 1 :] >= enough)
        if len(later):
            pairs.append((int(first), int(first + 1 + later[-1])))
    return pairs


def pair_geometry(
    tracks: Tracks, first: int, second: int, tolerance: float, seed: int
) -> PairGeometry:
    """Homography against fundamental matrix on the common tracks; `tolerance` in px at 480p."""
    common = tracks.common(first, second)
    center = np.array(tracks.size, np.float64) / 2.0
    a, b = tracks.xy[common, first], tracks.xy[common, second]
    # Tracks are good to about a pixel however small the frames are.
    threshold = max(1.0, tolerance * tracks.scale)
    motion = float(np.median(np.linalg.norm(b - a, axis=1))) / tracks.scale
    homography, _ = fit_homography(a, b, threshold, seed)
    plane_error = homography_error(homography, a, b)
    fundamental, _ = fit_fundamental(a, b, threshold, seed)
    line_error = sampson_error(fundamental, a, b)
    by_plane = plane_error < 2.0 * threshold
    by_line = line_error < threshold
    return PairGeometry(
        first,
        second,
        len(common),
        motion,
        float(by_plane.mean()),
        float((by_line | by_plane).mean()),
        float((by_line & ~by_plane).mean()),
        turn_residual(homography, a[by_plane], center) / tracks.scale,
    )


def turn_residual(matrix: np.ndarray | None, points: np.ndarray, center: np.ndarray) -> float:
    """RMS pixels between H and the best homography K₂ R K₁⁻¹ of a camera that only turns and zooms.

    Points are [N, 2] where H was observed; both focal lengths are free between 0.5 and 20 times
    the half picture, the principal point is the picture centre. 0 without a matrix.
    """
    from scipy.optimize import least_squares
    from scipy.spatial.transform import Rotation

    if matrix is None or len(points) < 8:
        return 0.0
    points = points[np.linspace(0, len(points) - 1, min(48, len(points))).astype(int)]
    points = points.astype(np.float64)
    moved = points @ matrix[:, :2].T + matrix[:, 2]
    unit = float(np.max(center))
    start, target = (points - center) / unit, (moved[:, :2] / moved[:, 2:] - center) / unit

    def residual(parameters: np.ndarray) -> np.ndarray:
        focal_a, focal_b = np.exp(parameters[3:])
        rays = np.column_stack([start / focal_a, np.ones(len(start))])
        rays = Rotation.from_rotvec(parameters[:3]).apply(rays)
        return (focal_b * rays[:, :2] / np.maximum(rays[:, 2:], 1e-3) - target).ravel()

    low, high = np.log(0.5), np.log(20.0)
    bounds = ([-2, -2, -4, low, low], [2, 2, 4, high, high])
    fits = []
    for focal in (1.2, 3.0):
        shift = np.mean(target - start, axis=0) / focal
        guess = np.array([-shift[1], shift[0], 0.0, np.log(focal), np.log(focal)])
        guess = np.clip(guess, np.array(bounds[0]) + 1e-3, np.array(bounds[1]) - 1e-3)
        fit = least_squares(residual, guess, bounds=bounds, max_nfev=40)
        fits.append(np.sqrt(2.0 * fit.cost / len(start)))
    return float(min(fits)) * unit


def track_radii(tracks: Tracks, seed: int, shortest: int = 4) -> np.ndarray:
    """Radius in px at 480p of a small circle covering 60 % of each track: [tracks long enough].

    The search starts from the track point with the nearest 60 % of the others and then moves to
    the centre of their smallest enclosing circle while that shrinks: at most twice the optimum,
    never negative. `seed` only decides which tracks are measured when there are many.
    """
    import cv2

    lengths = np.isfinite(tracks.xy[..., 0]).sum(axis=1)
    chosen = np.flatnonzero(lengths >= max(shortest, 0.25 * tracks.xy.shape[1]))
    if len(chosen) > 200:
        chosen = np.sort(np.random.default_rng(seed).choice(chosen, 200, replace=False))
    radii = []
    for index in chosen:
        points = tracks.xy[index]
        points = points[np.isfinite(points[:, 0])]
        keep = int(np.ceil(CIRCLE_SHARE * len(points)))
        spread = np.linalg.norm(points[:, None] - points[None], axis=-1)
        center = points[np.argmin(np.partition(spread, keep - 1, axis=1)[:, keep - 1])]
        radius = np.inf
        for _ in range(10):
            distance = np.linalg.norm(points - center, axis=1)
            nearest = points[np.argsort(distance, kind="stable")[:keep]]
            found, smaller = cv2.minEnclosingCircle(nearest)
            if smaller >= radius - 1e-3:
                break
            center, radius = np.float32(found), smaller
        radii.append(max(0.0, radius) / tracks.scale)
    return np.array(radii, np.float32)


def fit_homography(
    a: np.ndarray, b: np.ndarray, threshold: float, seed: int
) -> tuple[np.ndarray | None, np.ndarray]:
    """Robust b ~ H a, points [N, 2] → (H [3, 3] float64 or None, inliers [N] bool)."""
    import cv2

    if len(a) < 4:
        return None, np.zeros(len(a), bool)
    matrix, mask = cv2.findHomography(a, b, _usac(threshold, seed))
    if matrix is None:
        return None, np.zeros(len(a), bool)
    return matrix, mask[:, 0] > 0


def fit_fundamental(
    a: np.ndarray, b: np.ndarray, threshold: float, seed: int
) -> tuple[np.ndarray | None, np.ndarray]:
    """Robust F with bᵀ F a = 0, points [N, 2] → (F [3, 3] float64 or None, inliers [N] bool)."""
    import cv2

    if len(a) < 8:
        return None, np.zeros(len(a), bool)
    matrix, mask = cv2.findFundamentalMat(a, b, _usac(threshold, seed))
    if matrix is None or matrix.shape != (3, 3):
        return None, np.zeros(len(a), bool)
    return matrix, mask[:, 0] > 0


def homography_error(matrix: np.ndarray | None, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Transfer error |H a − b| in pixels; infinite without a matrix. a, b: [.., 2] → [..]."""
    if matrix is None:
        return np.full(a.shape[:-1], np.inf)
    moved = a.astype(np.float64) @ matrix[:, :2].T + matrix[:, 2]
    depth = np.where(np.abs(moved[..., 2:]) < 1e-9, 1e-9, moved[..., 2:])
    return np.linalg.norm(moved[..., :2] / depth - b, axis=-1)


def sampson_error(matrix: np.ndarray | None, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Sampson distance in pixels (first-order distance to the epipolar constraint). [.., 2] → [..].

    The square root of (bᵀFa)² / (|Fa|₁₂² + |Fᵀb|₁₂²), so it has the unit of the points.
    """
    if matrix is None:
        return np.full(a.shape[:-1], np.inf)
    line_b = a.astype(np.float64) @ matrix[:, :2].T + matrix[:, 2]  # F a
    line_a = b.astype(np.float64) @ matrix[:2] + matrix[2]  # Fᵀ b
    residual = line_b[..., 0] * b[..., 0] + line_b[..., 1] * b[..., 1] + line_b[..., 2]
    norm = (line_b[..., :2] ** 2).sum(-1) + (line_a[..., :2] ** 2).sum(-1)
    return np.abs(residual) / np.sqrt(np.maximum(norm, 1e-18))


def _usac(threshold: float, seed: int):
    import cv2

    parameters = cv2.UsacParams()
    parameters.threshold = threshold
    parameters.confidence = 0.999
    parameters.maxIterations = 2000
    parameters.randomGeneratorState = seed & 0x7FFFFFFF
    parameters.isParallel = False
    parameters.sampler = cv2.SAMPLING_UNIFORM
    parameters.score = cv2.SCORE_METHOD_MAGSAC
    parameters.loMethod = cv2.LOCAL_OPTIM_SIGMA
    parameters.final_polisher = cv2.MAGSAC
    parameters.final_polisher_iterations = 3
    return parameters
