"""Stage 4, small-viewpoint filtering: how far do points travel through a clip?

Keypoints are followed with pyramidal Lucas-Kanade, every step checked forward and backward. The
paper's measure is the radius of the smallest circle that covers 60 % of a track. What the tracks
say about the camera and the scene is in data_prep.parallax.

Points are [.., 2] (x, y) float32 pixels. Lengths in scores are pixels at 480p (short side = 480),
so that thresholds mean the same at every resolution.
"""

from __future__ import annotations

import dataclasses

import numpy as np

TRACKS_WANTED = 400
CIRCLE_SHARE = 0.6
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
