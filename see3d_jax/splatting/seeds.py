"""Where the first Gaussians go: points for `gaussians.from_points`, with colours.

Three sources, best first: sparse points of structure-from-motion, depth maps, or the photos alone.
From photos alone, candidates are placed along the rays of random pixels and the depth is kept
whose colours agree best in the neighbouring views (a plane sweep over single pixels of blurred
images): a rough hull of the scene, far better than noise and made in seconds.
All positions are in world units; cameras and depth as in `see3d_jax.geometry.cameras`.
"""

from __future__ import annotations

import numpy as np
from scipy.ndimage import gaussian_filter
from scipy.spatial import cKDTree

from see3d_jax.geometry.cameras import Camera

Points = tuple[np.ndarray, np.ndarray]  # [M, 3] positions, [M, 3] RGB in [0, 1]


def subsample(points: Points, number: int, rng: np.random.Generator) -> Points:
    """At most `number` of the points, without order."""
    xyz, rgb = points
    if len(xyz) <= number:
        return xyz, rgb
    chosen = np.sort(rng.choice(len(xyz), number, replace=False))
    return xyz[chosen], rgb[chosen]


def from_depth_maps(
    images: list[np.ndarray],
    depths: list[np.ndarray],
    cameras: list[Camera],
    number: int,
    rng: np.random.Generator,
) -> Points:
    """Random pixels with known depth (> 0), lifted to 3D, evenly over all views."""
    xyz, rgb = [], []
    for view, (image, depth, camera) in enumerate(zip(images, depths, cameras, strict=True)):
        share = number * (view + 1) // len(images) - number * view // len(images)
        rows, columns = np.nonzero(depth > 0)
        if not len(rows) or not share:
            continue
        chosen = rng.choice(len(rows), min(share, len(rows)), replace=False)
        rows, columns = rows[chosen], columns[chosen]
        xyz.append(_lift(camera, columns + 0.5, rows + 0.5, depth[rows, columns]))
        rgb.append(image[rows, columns] / 255.0)
    return (np.concatenate(xyz), np.concatenate(rgb)) if xyz else (np.zeros((0, 3)),) * 2


def from_photos(
    images: list[np.ndarray],
    cameras: list[Camera],
    number: int,
    rng: np.random.Generator,
    depths: int = 64,
    neighbours: int = 6,
    masks: list[np.ndarray | None] | None = None,
) -> Points:
    """Pixels at the depth at which their neighbours agree best (see the module docstring).

    `masks`: per view [H, W] bool, True = usable, or None.
    """
    nearest, farthest = depth_range(cameras)
    sweep = _Sweep(images, cameras, nearest)
    # Evenly spaced in inverse depth: evenly spaced in the other images.
    levels = 1.0 / np.linspace(1.0 / nearest, 1.0 / farthest, depths)
    xyz, rgb, costs = [], [], []
    for view, camera in enumerate(cameras):
        share = 2 * number // len(cameras) + 1
        x, y = rng.uniform(0, camera.width, share), rng.uniform(0, camera.height, share)
        points, cost = sweep.costs(view, x, y, np.broadcast_to(levels, (share, depths)), neighbours)
        if masks is not None and masks[view] is not None:
            cost[~_look_up(masks[view], x, y)] = np.inf
        best = cost.argmin(1)
        xyz.append(points[np.arange(share), best])
        rgb.append(_look_up(sweep.blurred[view], x, y))
        costs.append(cost[np.arange(share), best])
    xyz, rgb, cost = np.concatenate(xyz), np.concatenate(rgb), np.concatenate(costs)
    kept = np.sort(np.argsort(cost, kind="stable")[: min(number, np.isfinite(cost).sum())])
    return xyz[kept], rgb[kept]


class _Sweep:
    """How well points along the rays of a view agree in colour with its neighbours."""

    def __init__(self, images: list[np.ndarray], cameras: list[Camera], nearest: float) -> None:
        self.blurred = [
            gaussian_filter(image / 255.0, (2.0, 2.0, 0)).astype(np.float32) for image in images
        ]
        self._cameras, self._nearest = cameras, nearest
        self._positions = np.stack([_position(camera) for camera in cameras])

    def costs(
        self, view: int, x: np.ndarray, y: np.ndarray, depths: np.ndarray, neighbours: int = 6
    ) -> tuple[np.ndarray, np.ndarray]:
        """Pixels [M] at depths [M, D] → points [M, D, 3] and colour differences [M, D]."""
        own = _look_up(self.blurred[view], x, y)
        points = _lift(self._cameras[view], x[:, None], y[:, None], depths)
        away = np.linalg.norm(self._positions - self._positions[view], axis=1)
        differences = []
        for other in np.argsort(away, kind="stable")[1 : 1 + neighbours]:
            camera = self._cameras[other]
            px, py, depth = _project(camera, points)
            seen = (depth > 0.2 * self._nearest) & (px >= 0) & (py >= 0)
            seen &= (px < camera.width) & (py < camera.height)
            difference = np.abs(_look_up(self.blurred[other], px, py) - own[:, None]).mean(-1)
            differences.append(np.where(seen, difference, np.nan))
        stacked = np.sort(np.stack(differences), axis=0)  # NaN last
        visible = np.isfinite(stacked).sum(0)
        # The better half of the views that see a point: the others may be occluded.
        half = np.maximum((visible + 1) // 2, 1)
        ranks = np.arange(len(stacked))[:, None, None]
        cost = np.where(ranks < half, np.nan_to_num(stacked, nan=1.0), 0.0).sum(0) / half
        return points, cost + 0.3 * (visible < 2)


def fill_gaps(
    points: Points,
    images: list[np.ndarray],
    cameras: list[Camera],
    number: int,
    rng: np.random.Generator,
) -> Points:
    """The points, and up to `number` more where a view sees none nearby (sky, bare walls).

    Without them there would be nothing there to optimise, as Gaussians only move within their own
    reach. Such a pixel is lifted to the depth at which its neighbours agree best (a lawn has few
    points, and the nearest of them are those of the house behind it), and where they agree as well
    anywhere else (sky), to that of the point nearest to it in the image. Takes at least two views.
    """
    added = [points]
    near, far = depth_range(cameras, points[0])
    # It is what has no points that is looked for; what is seeded nearer still becomes haze.
    near, far = 0.6 * near, 2.0 * far
    sweep = _Sweep(images, cameras, near)
    levels = 1.0 / np.linspace(1.0 / near, 1.0 / far, 64)
    for view, (camera, image) in enumerate(zip(cameras, images, strict=True)):
        x, y, depth = _project(camera, points[0])
        seen = (depth > 0) & (x >= 0) & (y >= 0) & (x < camera.width) & (y < camera.height)
        if not seen.any():
            continue
        share = max(1, number // len(cameras))
        spots = rng.uniform(0, 1, (4 * share, 2)) * (camera.width, camera.height)
        gap, nearest = cKDTree(np.stack([x[seen], y[seen]], -1)).query(spots)
        spots, nearest = (leaf[gap > 0.04 * camera.width][:share] for leaf in (spots, nearest))
        swept = np.broadcast_to(levels, (len(spots), len(levels)))
        tried = np.concatenate([depth[seen][nearest][:, None], swept], axis=1)
        lifted, cost = sweep.costs(view, spots[:, 0], spots[:, 1], tried)
        cost[:, 0] = 0.5 * cost[:, 0] - 0.01  # no other depth is taken that is not much better
        lifted = lifted[np.arange(len(spots)), cost.argmin(1)]
        added.append((lifted, _look_up(image, spots[:, 0], spots[:, 1]) / 255.0))
    return np.concatenate([p for p, _ in added]), np.concatenate([c for _, c in added])


def depth_range(cameras: list[Camera], points: np.ndarray | None = None) -> tuple[float, float]:
    """(near, far) planar depth of what the cameras look at, in scene units.

    From points where there are any (1st to 99th percentile over all views); else from the point
    nearest to all viewing axes, or, should those be parallel, from the spacing of the cameras.
    """
    if points is not None and len(points):
        seen = []
        for camera in cameras:
            x, y, depth = _project(camera, np.asarray(points, np.float64))
            inside = (depth > 0) & (x >= 0) & (y >= 0) & (x < camera.width) & (y < camera.height)
            seen.append(depth[inside])
        depths = np.concatenate(seen)
        if len(depths):
            return float(np.quantile(depths, 0.01)), float(np.quantile(depths, 0.99))
    positions = np.stack([_position(camera) for camera in cameras])
    axes = np.stack([np.asarray(camera.world_to_camera, np.float64)[2, :3] for camera in cameras])
    spread = float(np.linalg.norm(positions - positions.mean(0), axis=1).max())
    projectors = np.eye(3) - axes[:, :, None] * axes[:, None, :]
    normal = projectors.sum(0)
    if np.linalg.eigvalsh(normal)[0] > 1e-3 * len(cameras):
        focus = np.linalg.solve(normal, (projectors @ positions[:, :, None]).sum(0)[:, 0])
        distance = float(np.median(((focus - positions) * axes).sum(1)))
        if distance > 0.1 * spread:
            return 0.3 * distance, 4.0 * distance
    return max(spread, 1e-3), 20.0 * max(spread, 1e-3)


def _position(camera: Camera) -> np.ndarray:
    matrix = np.asarray(camera.world_to_camera, np.float64)
    return -matrix[:3, :3].T @ matrix[:3, 3]


def _lift(camera: Camera, x: np.ndarray, y: np.ndarray, depth: np.ndarray) -> np.ndarray:
    """Pixels and depths of one shape → world points [..., 3] (float64 NumPy)."""
    intrinsics = np.asarray(camera.intrinsics, np.float64)
    matrix = np.asarray(camera.world_to_camera, np.float64)
    rays = [(x - intrinsics[0, 2]) / intrinsics[0, 0], (y - intrinsics[1, 2]) / intrinsics[1, 1]]
    local = np.stack(np.broadcast_arrays(rays[0] * depth, rays[1] * depth, depth), -1)
    return (local - matrix[:3, 3]) @ matrix[:3, :3]


def _project(camera: Camera, points: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    intrinsics = np.asarray(camera.intrinsics, np.float64)
    matrix = np.asarray(camera.world_to_camera, np.float64)
    local = points @ matrix[:3, :3].T + matrix[:3, 3]
    depth = np.where(np.abs(local[..., 2]) < 1e-9, 1e-9, local[..., 2])
    x = intrinsics[0, 0] * local[..., 0] / depth + intrinsics[0, 2]
    y = intrinsics[1, 1] * local[..., 1] / depth + intrinsics[1, 2]
    return x, y, local[..., 2]


def _look_up(image: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    columns = np.clip(x, 0, image.shape[1] - 1).astype(int)
    rows = np.clip(y, 0, image.shape[0] - 1).astype(int)
    return image[rows, columns]
