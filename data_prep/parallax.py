"""Stage 4, second half: is what the tracks show one rigid scene, seen by a camera that travels?

A long track is not enough: under pure rotation or zoom every point travels far, yet one homography
explains all of it and nothing can be learnt about depth. So the tracks of frame pairs far apart are
explained by a homography and by a fundamental matrix, and what only the second explains is
parallax. Two motions can imitate it, and each breaks something that a static scene cannot:

    an object before a background   two frames ask only that points stay on epipolar lines; their
                                    depths must also place them in a third frame (rigid_share)
    one object that slides along    a scene has depths of all sizes between the background and the
    before a turning camera         nearest thing, one object has one (parallax_spread)

Points are [N, 2] (x, y) float32 pixels. Lengths in scores are pixels at 480p (short side = 480).
"""

from __future__ import annotations

import dataclasses

import numpy as np

from data_prep.epipolar import (
    fit_fundamental,
    fit_homography,
    homography_error,
    sampson_error,
    transfer,
)
from data_prep.tracking import Tracks

MIN_PAIR_TRACKS = 40
SECOND_PLANE_SHARE = 0.2
RESECTION_SAMPLES = 128
RESECTION_POINTS = 6  # of a 3×4 camera matrix


@dataclasses.dataclass(frozen=True)
class PairGeometry:
    """How two frames far apart relate, from their common tracks.

    Attributes:
      rigid_share: share of tracks that one rigid scene explains in a third frame as well.
      parallax_share: share explained by the fundamental matrix, not by the homography.
      parallax_spread: points with less than half of the larger parallaxes (their upper quartile),
        as a share of all that have any.
      turn_residual: how far the homography is from a turning and zooming camera, px at 480p; a
        large value means that the camera itself moved, even past a flat scene.
      travel_residual: the smaller of that and the same of the second plane; a small value means
        that what is behind shows a camera which stays where it is.
    """

    rigid_share: float
    parallax_share: float
    parallax_spread: float
    turn_residual: float
    travel_residual: float


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


def pair_threshold(size: tuple[int, int], tolerance: float) -> float:
    """Pixels that a track may be off; `tolerance` in px at 480p.

    Tracks are good to about a pixel however small the frames are.
    """
    return max(1.0, tolerance * min(size) / 480.0)


def pair_points(
    tracks: Tracks, frames: np.ndarray, pair: tuple[int, int], tolerance: float, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Common tracks in the first frame, halfway and in the last: three times [N, 2] float32.

    A track followed over many frames drifts, most of all when its surroundings grow or turn. So the
    last of the frames [F, H, W, 3] is laid over the first by a homography, where only parallax is
    left, and the end points are searched again there.
    """
    first, last = pair
    common = tracks.common(first, last)
    start, middle, end = (tracks.xy[common, f] for f in (first, (first + last) // 2, last))
    threshold = pair_threshold(tracks.size, tolerance)
    homography, _ = fit_homography(start, end, threshold, seed)
    if homography is None or abs(np.linalg.det(homography)) < 1e-6:
        return start, middle, end
    return start, middle, _register(frames[first], frames[last], start, end, homography, threshold)


def _register(
    frame_a: np.ndarray, frame_b: np.ndarray, a: np.ndarray, b: np.ndarray, homography: np.ndarray,
    threshold: float,
) -> np.ndarray:  # fmt: skip
    """`b` measured again in frame b laid over frame a; as it was where nothing near is found."""
    import cv2

    gray_a, gray_b = (
        cv2.cvtColor(np.ascontiguousarray(frame), cv2.COLOR_RGB2GRAY)
        for frame in (frame_a, frame_b)
    )
    height, width = gray_a.shape
    over = cv2.warpPerspective(
        gray_b, homography, (width, height), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    )
    guess = transfer(np.linalg.inv(homography), b).astype(np.float32)
    found, ok, _ = cv2.calcOpticalFlowPyrLK(
        gray_a, over, a[:, None], guess[:, None].copy(), winSize=(15, 15), maxLevel=1,
        flags=cv2.OPTFLOW_USE_INITIAL_FLOW,
    )  # fmt: skip
    found = found[:, 0]
    near = (ok[:, 0] > 0) & (np.linalg.norm(found - guess, axis=1) < 3.0 * threshold)
    return np.where(near[:, None], transfer(homography, found), b).astype(np.float32)


def pair_geometry(
    start: np.ndarray, middle: np.ndarray, end: np.ndarray, size: tuple[int, int],
    tolerance: float, seed: int,
) -> PairGeometry:  # fmt: skip
    """What explains points [N, 2] in three frames of a size (width, height).

    `tolerance` is the error of a point in px at 480p.
    """
    threshold = pair_threshold(size, tolerance)
    homography, _ = fit_homography(start, end, threshold, seed)
    fundamental, _ = fit_fundamental(start, end, threshold, seed)
    plane_error = homography_error(homography, start, end)
    by_plane = plane_error < 2.0 * threshold
    parallax = (sampson_error(fundamental, start, end) < threshold) & ~by_plane
    largest = float(np.quantile(plane_error[parallax], 0.75)) if parallax.any() else 0.0
    little = parallax & (plane_error < 0.5 * largest)
    center, scale = np.array(size, np.float64) / 2.0, min(size) / 480.0
    turn = turn_residual(homography, start[by_plane], center)
    behind = second_turn_residual(
        start[~by_plane], end[~by_plane], len(start), center, threshold, seed
    )
    return PairGeometry(
        rigid_share(start, middle, end, fundamental, homography, size, threshold, seed),
        float(parallax.mean()),
        float(little.sum() / max(1, parallax.sum())),
        turn / scale,
        min(turn, behind) / scale,
    )


def second_turn_residual(
    a: np.ndarray, b: np.ndarray, tracks: int, center: np.ndarray, threshold: float, seed: int
) -> float:
    """`turn_residual` of the second plane, from points [N, 2] off the first; infinite without one.

    A thing before a turning camera may hold more tracks than the background, which is then second.
    """
    wanted = SECOND_PLANE_SHARE * tracks
    if len(a) < wanted:
        return float("inf")
    homography, _ = fit_homography(a, b, threshold, seed)
    inside = homography_error(homography, a, b) < 2.0 * threshold
    if inside.sum() < wanted:
        return float("inf")
    return turn_residual(homography, a[inside], center)


def rigid_share(
    start: np.ndarray, middle: np.ndarray, end: np.ndarray, fundamental: np.ndarray | None,
    homography: np.ndarray | None, size: tuple[int, int], threshold: float, seed: int,
) -> float:  # fmt: skip
    """Share of points [N, 2] whose depth from two frames places them right in the middle one.

    With a plane H in the scene and the epipole e, x_end ~ H x_start + d e gives every point its
    projective depth d, and x_middle ~ P (x_start, d) holds for one camera matrix P [3, 4]. Points
    that only turn or zoom need no depth, so nothing degenerates without parallax.
    """
    if fundamental is None or homography is None or len(start) < 2 * RESECTION_POINTS:
        return 0.0
    center, unit = np.array(size, np.float64) / 2.0, max(size) / 2.0
    scaling = np.array([[1, 0, -center[0]], [0, 1, -center[1]], [0, 0, unit]]) / unit
    back = np.linalg.inv(scaling)
    first, last = (
        np.column_stack([(points - center) / unit, np.ones(len(points))]) for points in (start, end)
    )
    depth = _projective_depth(back.T @ fundamental @ back, scaling @ homography @ back, first, last)
    seen = (middle.astype(np.float64) - center) / unit
    limit = 1.5 * threshold / unit
    error = _resection_error(np.column_stack([first, depth]), seen, limit, seed)
    return float((error < limit).mean())


def _projective_depth(
    fundamental: np.ndarray, homography: np.ndarray, first: np.ndarray, last: np.ndarray
) -> np.ndarray:
    """d of every point in x_last ~ A x_first + d e, scaled to a spread of 1. [N, 3] → [N].

    A is the homography of the family [e]ₓ F + e vᵀ, all of which fit F, that is nearest to the
    given one: the general member is singular, which would spoil the depths.
    """
    epipole = np.linalg.svd(fundamental)[0][:, 2]
    x, y, z = epipole
    canonical = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]]) @ fundamental
    system = np.column_stack([np.kron(epipole[:, None], np.eye(3)), -homography.reshape(9)])
    solution = np.linalg.lstsq(system, -canonical.reshape(9), rcond=None)[0]
    plane = canonical + np.outer(epipole, solution[:3])
    off_plane = np.cross(last, first @ plane.T)
    per_depth = np.cross(last, epipole)
    depth = -(off_plane * per_depth).sum(1) / np.maximum((per_depth**2).sum(1), 1e-12)
    return np.clip(depth / max(float(np.std(depth)), 1e-12), -20, 20)  # a point at e has none


def _resection_error(points: np.ndarray, seen: np.ndarray, limit: float, seed: int) -> np.ndarray:
    """Errors [N] of `seen` [N, 2] under the camera that fits most of `points` [N, 4] best."""
    rows = np.zeros((len(points), 2, 12))
    rows[:, 0, 0:4] = rows[:, 1, 4:8] = points
    rows[:, 0, 8:] = -seen[:, :1] * points
    rows[:, 1, 8:] = -seen[:, 1:] * points

    def errors(cameras: np.ndarray) -> np.ndarray:
        moved = np.einsum("nj,...ij->...ni", points, cameras)
        depth = np.where(np.abs(moved[..., 2:]) < 1e-12, 1e-12, moved[..., 2:])
        return np.linalg.norm(moved[..., :2] / depth - seen, axis=-1)

    generator = np.random.default_rng(seed)
    order = generator.random((RESECTION_SAMPLES, len(points))).argsort(1)[:, :RESECTION_POINTS]
    samples = rows[order].reshape(RESECTION_SAMPLES, 12, 12)
    tried = errors(np.linalg.svd(samples)[2][:, -1].reshape(-1, 3, 4))
    error = tried[np.minimum(tried / limit, 1.0).sum(1).argmin()]
    for _ in range(4):
        good = error < limit
        if good.sum() < RESECTION_POINTS + 2:
            break
        camera = np.linalg.svd(rows[good].reshape(-1, 12), full_matrices=False)[2][-1]
        error = errors(camera.reshape(3, 4))
    return error


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
