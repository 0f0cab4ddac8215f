"""Bundle adjustment: cameras and points that agree with where photos show the same spots.

Minimises the distances (pixels) between observed and projected points over poses and points, by
Levenberg–Marquardt with the points eliminated (Schur complement; Triggs et al. 2000, "Bundle
Adjustment – A Modern Synthesis"). Distances count by Cauchy's robust cost, so that wrong matches do
not pull. A weak pull to the given poses fixes what no picture shows (where the world is, how it is
turned and how large it is), and holds cameras that see too little.
NumPy in float64, as the normal equations are too ill-conditioned for float32; a few hundred views
take seconds. OpenCV axes, world→camera, pixel centres at +0.5.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import scipy.sparse as sparse

# How far off given cameras are thought to be: radians, and parts of the scene's size.
_TURN, _SHIFT = 0.05, 0.05
# Pixels: distances are not told apart more finely than this.
_FINEST = 0.2
_ITERATIONS = 100
# A step that lowers the cost by less than this share of it is the last one.
_CONVERGED = 1e-6
# Squared sine of the parallax below which a point is placed by the scene's size instead.
_FLAT = 1e-3
_FEWEST = 20  # sightings of a view whose median says something about its camera
_NEAREST = 1e-3  # of the scene's size: what is nearer, or behind a camera, is not seen by it


@dataclasses.dataclass(frozen=True)
class Tracks:
    """M sightings of P points.

    Attributes:
      views: [M] int, which view sees it.
      points: [M] int below P, which point it is; every point has sightings in two views or more.
      pixels: [M, 2] where.
    """

    views: np.ndarray
    points: np.ndarray
    pixels: np.ndarray

    def __len__(self) -> int:
        return len(self.views)


@dataclasses.dataclass(frozen=True)
class Adjustment:
    """What came out.

    Attributes:
      poses: [V, 4, 4] float64 world→camera.
      points: [P, 3] float64.
      before, after: median distance in pixels of sightings from their points in the view where it
        is largest (of those with `_FEWEST` sightings, if any), with the given poses (and the
        points that suit these best) and with the adjusted ones; both as large as
        they would be had nothing been fitted to these very sightings (infinite where there are
        not more of them than unknowns).
    """

    poses: np.ndarray
    points: np.ndarray
    before: float
    after: float


def adjust(
    intrinsics: np.ndarray,
    poses: np.ndarray,
    tracks: Tracks,
    scene_size: float,
    free: np.ndarray | None = None,
) -> Adjustment:
    """Poses and points that fit the sightings.

    Args:
      intrinsics: [V, 3, 3] pixels; they stay as they are.
      poses: [V, 4, 4] world→camera, a few degrees and a few percent of the scene from right.
      tracks: what the views see.
      scene_size: typical distance from cameras to content.
      free: [V] bool, the cameras that may move; by default all.
    """
    given = np.asarray(poses, np.float64)
    intrinsics = np.asarray(intrinsics, np.float64)
    free = np.ones(len(given), bool) if free is None else np.asarray(free, bool)
    problem = _Problem(intrinsics, given, tracks, float(scene_size))
    still, points = problem.minimised(given, problem.triangulated(), np.zeros_like(free))
    found, moved_points = problem.minimised(still, points, free)
    before = problem.distance(given, points, 0)
    after = problem.distance(found, moved_points, int(free.sum()))
    return Adjustment(found, moved_points, before, after)


@dataclasses.dataclass(frozen=True)
class _Problem:
    intrinsics: np.ndarray
    given: np.ndarray
    tracks: Tracks
    scene_size: float

    def triangulated(self) -> np.ndarray:
        """[P, 3] nearest to all rays; where they hardly cross, at the scene's size along them."""
        views, points = self.tracks.views, self.tracks.points
        k, pose = self.intrinsics[views], self.given[views]
        xy = (self.tracks.pixels - k[:, :2, 2]) / k[:, [0, 1], [0, 1]]
        ray = np.einsum("mji,mj->mi", pose[:, :3, :3], np.append(xy, np.ones((len(xy), 1)), 1))
        eye = -np.einsum("mji,mj->mi", pose[:, :3, :3], pose[:, :3, 3])
        there = eye + self.scene_size * ray
        ray /= np.linalg.norm(ray, axis=-1, keepdims=True)
        across = np.eye(3) - ray[:, :, None] * ray[:, None, :]
        left = self._sum(across + _FLAT * np.eye(3), points)
        right = self._sum(np.einsum("mij,mj->mi", across, eye) + _FLAT * there, points)
        return np.linalg.solve(left, right[..., None])[..., 0]

    def seen(self, poses: np.ndarray, points: np.ndarray) -> tuple[np.ndarray, ...]:
        """Distances [M, 2] in pixels, positions [M, 3] in the cameras, and what is in front [M]."""
        pose, k = poses[self.tracks.views], self.intrinsics[self.tracks.views]
        local = np.einsum("mij,mj->mi", pose[:, :3, :3], points[self.tracks.points])
        local += pose[:, :3, 3]
        ahead = local[:, 2] > _NEAREST * self.scene_size
        depth = np.where(ahead, local[:, 2], 1.0)[:, None]
        at = local[:, :2] / depth * k[:, [0, 1], [0, 1]] + k[:, :2, 2]
        return at - self.tracks.pixels, local, ahead

    def distance(self, poses: np.ndarray, points: np.ndarray, fitted: int) -> float:
        """As `Adjustment.before`, corrected for the points and the cameras fitted to it."""
        given = 2 * len(self.tracks)
        left = given - 3 * len(points) - 6 * fitted
        if left <= 0:
            return float("inf")
        size = np.linalg.norm(self.seen(poses, points)[0], axis=-1)
        of_view = [size[self.tracks.views == view] for view in range(len(poses))]
        medians = [np.median(part) for part in of_view if len(part) >= _FEWEST]
        return float(max(medians, default=np.median(size)) * np.sqrt(given / left))

    def minimised(
        self, poses: np.ndarray, points: np.ndarray, free: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Poses of the free cameras and all points after Levenberg–Marquardt."""
        damping = 1e-4
        for _ in range(_ITERATIONS):
            error, _, ahead = self.seen(poses, points)
            size = np.linalg.norm(error[ahead], axis=-1)
            scale = max(_FINEST, 2 * float(np.median(size))) if len(size) else 1.0
            cost = self._cost(poses, points, scale)
            equations = self._equations(poses, points, scale)
            while True:
                shift, push = equations.solve(damping, free)
                tried = _turned(poses, shift), points + push
                after = self._cost(*tried, scale)
                if after < cost or damping > 1e6:
                    break
                damping *= 10
            if after >= cost:
                break
            poses, points = tried
            damping = max(1e-9, damping / 10)
            if after > (1 - _CONVERGED) * cost:
                break
        return poses, points

    def _cost(self, poses: np.ndarray, points: np.ndarray, scale: float) -> float:
        error, _, ahead = self.seen(poses, points)
        # A point behind a camera that saw it costs as much as one that is far off.
        squared = np.where(ahead, (error**2).sum(-1), 1e4 * scale**2)
        return scale**2 * float(np.log1p(squared / scale**2).sum()) + float(
            (self._from_given(poses) ** 2).sum()
        )

    def _from_given(self, poses: np.ndarray) -> np.ndarray:
        """[V, 6] motion from the given poses, 1 = as far as is thought likely."""
        turn = poses[:, :3, :3] @ np.swapaxes(self.given[:, :3, :3], 1, 2)
        skew = (turn - np.swapaxes(turn, 1, 2)) / 2
        vector = np.stack([skew[:, 2, 1], skew[:, 0, 2], skew[:, 1, 0]], -1)
        shift = poses[:, :3, 3] - np.einsum("vij,vj->vi", turn, self.given[:, :3, 3])
        return np.concatenate([vector / _TURN, shift / (_SHIFT * self.scene_size)], -1)

    def _equations(self, poses: np.ndarray, points: np.ndarray, scale: float) -> _Equations:
        views, ids = self.tracks.views, self.tracks.points
        error, local, ahead = self.seen(poses, points)
        weight = np.where(ahead, 1 / (1 + (error**2).sum(-1) / scale**2), 0.0)
        focal = self.intrinsics[views][:, [0, 1], [0, 1]]
        z = np.where(ahead, local[:, 2], 1.0)
        slope = np.zeros((len(views), 2, 3))  # of the pixel, by the position in the camera
        slope[:, [0, 1], [0, 1]] = focal / z[:, None]
        slope[:, :, 2] = -focal * local[:, :2] / z[:, None] ** 2
        zero = np.zeros(len(views))
        x, y, depth = local.T
        turned = np.stack([zero, depth, -y, -depth, zero, x, y, -x, zero], -1).reshape(-1, 3, 3)
        by_pose = np.concatenate([slope @ turned, slope], -1)
        by_point = slope @ poses[views, :3, :3]
        weighted_pose, weighted_point = (j * weight[:, None, None] for j in (by_pose, by_point))

        def product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
            return np.einsum("mki,mkj->mij", a, b)

        pull = np.tile([_TURN, _SHIFT * self.scene_size], (3, 1)).T.reshape(-1) ** -2.0
        poses_block = np.zeros((len(poses), 6, 6))
        np.add.at(poses_block, views, product(weighted_pose, by_pose))
        poses_block += np.diag(pull)
        poses_slope = np.sqrt(pull) * self._from_given(poses)
        np.add.at(poses_slope, views, np.einsum("mki,mk->mi", weighted_pose, error))
        # Sightings that count for nothing must not leave a point without an equation.
        points_block = self._sum(product(weighted_point, by_point), ids)
        points_block += 1e-9 * (focal.max() / self.scene_size) ** 2 * np.eye(3)
        points_slope = self._sum(np.einsum("mki,mk->mi", weighted_point, error), ids)
        mixed = product(weighted_pose, by_point)  # [M, 6, 3]
        rows = np.broadcast_to((6 * views[:, None] + np.arange(6))[:, :, None], mixed.shape)
        columns = np.broadcast_to((3 * ids[:, None] + np.arange(3))[:, None, :], mixed.shape)
        mixed = sparse.csr_array(
            (mixed.ravel(), (rows.ravel(), columns.ravel())),
            shape=(6 * len(poses), 3 * len(points)),
        )
        return _Equations(poses_block, points_block, mixed, poses_slope, points_slope)

    def _sum(self, values: np.ndarray, points: np.ndarray) -> np.ndarray:
        total = np.zeros((int(self.tracks.points.max()) + 1, *values.shape[1:]))
        np.add.at(total, points, values)
        return total


@dataclasses.dataclass(frozen=True)
class _Equations:
    """Normal equations: blocks of poses and points, what is between them, and the slopes."""

    poses: np.ndarray  # [V, 6, 6]
    points: np.ndarray  # [P, 3, 3]
    mixed: sparse.csr_array  # [6V, 3P]
    poses_slope: np.ndarray  # [V, 6]
    points_slope: np.ndarray  # [P, 3]

    def solve(self, damping: float, free: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Motions of the cameras [V, 6], 0 where they are not free, and of the points [P, 3]."""
        poses, points = (
            block * (1 + damping * np.eye(block.shape[-1])) for block in (self.poses, self.points)
        )
        inverse = np.linalg.inv(points)
        count, number = len(poses), len(points)
        shift = np.zeros(6 * count)
        if free.any():
            order = np.arange(number)
            eliminated = sparse.bsr_array(
                (inverse, order, np.arange(number + 1)), shape=(3 * number, 3 * number)
            )
            carried = self.mixed @ eliminated
            reduced = -(carried @ self.mixed.T).toarray()
            for view in range(count):
                reduced[6 * view : 6 * view + 6, 6 * view : 6 * view + 6] += poses[view]
            right = carried @ self.points_slope.ravel() - self.poses_slope.ravel()
            moving = np.repeat(free, 6)
            shift[moving] = np.linalg.solve(reduced[np.ix_(moving, moving)], right[moving])
        right = -self.points_slope.ravel() - self.mixed.T @ shift
        return shift.reshape(-1, 6), np.einsum("pij,pj->pi", inverse, right.reshape(-1, 3))


def _turned(poses: np.ndarray, motions: np.ndarray) -> np.ndarray:
    """exp(motion) · pose, motions [V, 6] as (rotation vector, translation) in the camera's axes."""
    x, y, z = motions[:, :3].T
    zero = np.zeros_like(x)
    cross = np.stack([zero, -z, y, z, zero, -x, -y, x, zero], -1).reshape(-1, 3, 3)
    angle = np.linalg.norm(motions[:, :3], axis=-1)[:, None, None]
    turn = np.eye(3) + np.sinc(angle / np.pi) * cross
    turn += 0.5 * np.sinc(angle / (2 * np.pi)) ** 2 * cross @ cross
    result = poses.copy()
    result[:, :3, :] = turn @ poses[:, :3, :]
    result[:, :3, 3] += motions[:, 3:]
    return result
